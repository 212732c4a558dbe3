"""Tables that are read, and follow what is written: to a later mark by what is new, as if all of it were read there."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import StoreFault
from shoal.tables.consistency import Async, Sync
from shoal.tables.stored import Followed, tables_at
from tests.tables.test_applying import opened, push_of, run


def held(tables):
    return {
        name: [array.tolist() for array in table.image().by_id().arrays().values()] for name, table in tables.items()
    }


@pytest.mark.parametrize("consistency", [Sync(), Async()])
def test_what_follows_is_what_is_read_anew_with_what_has_expired_left_out(tmp_path, consistency):
    journal = opened(tmp_path, consistency)
    run(journal, range(2))
    journal.mark(2)
    followed = Followed(tmp_path, 2)
    for begin, end in ((2, 3), (3, 7), (7, 12)):
        run(journal, range(begin, end))
        journal.mark(end, keep=[2])
        assert followed.advance(end)
        assert held(followed.tables) == held(tables_at(tmp_path, end))
    before, now = held(tables_at(tmp_path, 2))["a"][0], held(followed.tables)["a"][0]
    assert set(before) - set(now), "table a expires"
    journal.close()


def test_a_step_that_may_be_taken_back_is_not_followed_until_it_may_not(tmp_path):
    """In step the shards may be a push ahead of the version."""
    journal = opened(tmp_path, Sync())
    run(journal, range(3))
    journal.push(push_of(3, 0))
    journal.mark(3)
    followed = Followed(tmp_path, 3)
    for lane in (1, 2, 3):
        journal.push(push_of(3, lane))
    run(journal, range(4, 5))
    journal.mark(5)
    assert followed.advance(5) and held(followed.tables) == held(tables_at(tmp_path, 5))
    journal.close()


def test_what_lies_before_a_snapshot_cannot_be_followed(tmp_path):
    journal = opened(tmp_path, Async())
    run(journal, range(2))
    journal.mark(2)
    followed = Followed(tmp_path, 2)
    before = held(followed.tables)
    run(journal, range(2, 4))
    journal.snapshot()
    journal.mark(4)
    assert not followed.advance(4)
    assert held(followed.tables) == before
    assert held(Followed(tmp_path, 4).tables) == held(journal.tables)
    journal.close()


def test_what_is_not_marked_or_is_damaged_is_refused(tmp_path):
    journal = opened(tmp_path, Async())
    run(journal, range(2))
    journal.mark(2)
    followed = Followed(tmp_path, 2)
    with pytest.raises(StoreFault, match="does not hold the tables of step 9"):
        followed.advance(9)
    run(journal, range(2, 4))
    journal.mark(4)
    path = tmp_path / "log-0"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreFault, match="is damaged at byte"):
        followed.advance(4)
    journal.close()


def test_what_is_pulled_is_what_the_journal_has(tmp_path):
    journal = opened(tmp_path, Async())
    run(journal, range(3))
    journal.mark(3)
    ids = np.arange(40)
    np.testing.assert_array_equal(Followed(tmp_path, 3).tables["b"].pull(ids), journal.pull("b", ids))
    journal.close()
