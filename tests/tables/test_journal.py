"""Exactly once, over any crash: pushes that are new, known, too late, amiss; snapshots, logs, and a kill -9."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shoal.errors import ConfigError, Diverged, StoreFault
from shoal.tables import FTRL, Adam, TableSpec
from shoal.tables.book import Book, Verdict
from shoal.tables.frame import Begin, Head, Part, PartHead, Push, decode
from shoal.tables.journal import Journal, Keeping

SPECS = (
    TableSpec(name="users", dim=4, rule=Adam(lr=0.1), dtype="bfloat16", admit_after=2),
    TableSpec(name="ads", dim=1, rule=FTRL(alpha=0.1)),
)
BUDGET = 1 << 22


def push_of(step, lane=0, generation=1, size=20):
    random = np.random.default_rng([step, lane])
    parts = [
        Part(spec.name, np.unique(random.integers(0, 60, size)), np.empty(0, np.float32)) for spec in SPECS
    ]  # fmt: skip
    parts = [
        Part(p.table, p.ids, random.standard_normal((len(p.ids), s.dim), dtype=np.float32))
        for p, s in zip(parts, SPECS, strict=True)
    ]
    return Push(generation, {lane: (8 * step, 8 * step + 8)}, parts, now_s=step)


def opened(folder: Path, **how) -> Journal:
    return Journal(folder, SPECS, Keeping(memory_bytes=BUDGET, **how))


def equal(one: Journal, other: Journal) -> None:
    assert one.applier.book == other.applier.book
    for name, table in one.tables.items():
        a, b = table.image().by_id(), other.tables[name].image().by_id()
        assert a.meta() == b.meta()
        for key, array in a.arrays().items():
            np.testing.assert_array_equal(array, b.arrays()[key], key)


def undisturbed(folder: Path, pushes) -> Journal:
    journal = opened(folder)
    for push in pushes:
        assert journal.push(push) is Verdict.NEW
    return journal


# The book


@pytest.mark.parametrize(
    ("generation", "spans", "verdict"),
    [
        (3, {0: (10, 12)}, Verdict.NEW),
        (4, {0: (10, 12), 1: (5, 6), 9: (0, 1)}, Verdict.NEW),
        (3, {0: (8, 10)}, Verdict.KNOWN),
        (3, {0: (0, 4), 1: (4, 5)}, Verdict.KNOWN),
        (2, {0: (10, 12)}, Verdict.ZOMBIE),
        (2, {0: (8, 10)}, Verdict.ZOMBIE),
        (3, {0: (11, 12)}, Verdict.AMISS),
        (3, {0: (8, 12)}, Verdict.AMISS),
        (3, {0: (10, 12), 1: (4, 5)}, Verdict.AMISS),
        (3, {0: (10, 10)}, Verdict.AMISS),
    ],
)
def test_a_push_is_new_known_too_late_or_amiss(generation, spans, verdict):
    assert Book(3, {0: 10, 1: 5}).judge(generation, spans) is verdict


def test_what_was_applied_is_known_and_an_older_generation_is_over():
    book = Book().after(1, {0: (0, 4), 2: (0, 8)})
    assert book.judge(1, {0: (0, 4)}) is Verdict.KNOWN
    assert book.judge(1, {0: (4, 8)}) is Verdict.NEW
    assert book.begin(2).judge(1, {0: (4, 8)}) is Verdict.ZOMBIE


# Frames


def test_a_push_is_read_as_it_was_written():
    push = push_of(3, lane=7)
    found = decode(b"".join(push.encode()))
    assert (found.generation, found.lanes, found.now_s) == (push.generation, push.lanes, push.now_s)
    for one, other in zip(found.parts, push.parts, strict=True):
        assert one.table == other.table
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.gradients, other.gradients)


def test_the_beginning_of_a_generation_is_read_as_it_was_written():
    assert decode(b"".join(Begin(4, 17).encode())) == Begin(4, 17)


@pytest.mark.parametrize("cut", [0, 3, 10, 40, -1])
def test_a_part_of_a_push_is_none(cut):
    body = b"".join(push_of(0).encode())
    with pytest.raises(ConfigError, match="push"):
        decode(body[:cut])


# The journal


@pytest.mark.parametrize("sizes", [(2**64 - 1, 1), (0, 2**64 - 1), (2**63, 2**63), (-(2**63), -1), (-1, 4)])
def test_a_push_that_tells_of_sizes_that_cannot_be_is_none(sizes):
    head = msgspec.msgpack.encode(Head(1, {0: (0, 1)}, 0, (PartHead("a", *sizes),)))
    body = struct.pack("<I", len(head)) + head
    with pytest.raises(ConfigError, match="are no push"):
        decode(body + bytes(-len(body) % 8))


def test_a_push_that_is_sent_again_is_applied_once(tmp_path):
    pushes = [push_of(step, lane) for step in range(5) for lane in (0, 1)]
    journal = opened(tmp_path / "often")
    for push in pushes:
        verdicts = [journal.push(push) for _ in range(3)]
        assert verdicts == [Verdict.NEW, Verdict.KNOWN, Verdict.KNOWN]
    assert journal.push(push_of(2)) is Verdict.KNOWN
    assert journal.push(push_of(9)) is Verdict.AMISS
    assert journal.push(push_of(5, generation=0)) is Verdict.ZOMBIE
    equal(journal, undisturbed(tmp_path / "once", pushes))


@pytest.mark.parametrize("snapshot_at", [None, 0, 4, 9])
def test_one_that_is_opened_again_goes_on_where_it_was(tmp_path, snapshot_at):
    pushes = [push_of(step) for step in range(10)]
    journal = opened(tmp_path / "a")
    for number, push in enumerate(pushes):
        journal.push(push)
        if number == snapshot_at:
            journal.snapshot()
    journal.close()
    again = opened(tmp_path / "a")
    assert again.torn is None
    equal(again, undisturbed(tmp_path / "b", pushes))
    assert again.push(push_of(10)) is Verdict.NEW


def test_without_a_log_what_came_after_the_snapshot_is_new_again(tmp_path):
    journal = opened(tmp_path, durability="snapshot")
    for step in range(6):
        journal.push(push_of(step))
        if step == 2:
            journal.snapshot()
    journal.close()
    again = opened(tmp_path, durability="snapshot")
    assert again.applier.book.cursor(0) == 24
    assert [again.push(push_of(step)) for step in (2, 3)] == [Verdict.KNOWN, Verdict.NEW]


def test_a_push_that_was_torn_was_never_acknowledged_and_is_new(tmp_path):
    journal = undisturbed(tmp_path / "a", [push_of(step) for step in range(3)])
    journal.close()
    with (tmp_path / "a" / "log-0").open("ab") as file:
        file.write(b"\x40\x00\x00\x00\x01\x02\x03\x04torn")
    again = opened(tmp_path / "a")
    assert again.torn is not None and again.torn.num_bytes == 12
    assert again.push(push_of(3)) is Verdict.NEW
    equal(again, undisturbed(tmp_path / "b", [push_of(step) for step in range(4)]))


def test_a_snapshot_that_was_not_finished_does_not_count(tmp_path):
    journal = undisturbed(tmp_path, [push_of(0)])
    journal.close()
    (tmp_path / "snapshot-1.partial").write_bytes(b"half")
    (tmp_path / "log-1").write_bytes(b"shoal log 1\n")
    again = opened(tmp_path)
    assert again.applier.book.cursor(0) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "log-0", "tables.json"]


def test_a_gradient_that_is_not_finite_names_worker_and_lane(tmp_path):
    journal = opened(tmp_path)
    push = push_of(0, lane=5)
    push.parts[1].gradients[0, 0] = np.nan
    with pytest.raises(Diverged, match=r"table ads: the gradient of id \d+ is not finite.*\(worker w3, lanes \[5\]\)"):
        journal.push(push, "w3")
    assert journal.applier.book == Book() and journal.tables["users"].clock == 0 and journal.log_bytes == 12


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("nobody", np.array([1]), np.ones((1, 4), np.float32)), "no table 'nobody'; there are users, ads"),
        (Part("users", np.array([1]), np.ones((1, 3), np.float32)), r"float32 of shape \(1, 4\)"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_it_is_logged(tmp_path, part, message):
    journal = opened(tmp_path)
    with pytest.raises(ConfigError, match=message):
        journal.push(Push(1, {0: (0, 1)}, [part]))
    assert journal.log_bytes == 12


def test_what_is_kept_is_not_read_as_other_tables(tmp_path):
    journal = undisturbed(tmp_path, [push_of(0)])
    journal.snapshot()
    journal.close()
    with pytest.raises(ConfigError, match="is of the tables"):
        Journal(tmp_path, SPECS[:1], Keeping(memory_bytes=BUDGET))
    with pytest.raises(ConfigError, match="is not one of"):
        Journal(tmp_path, (TableSpec(name="users", dim=8), SPECS[1]), Keeping(memory_bytes=BUDGET))
    with pytest.raises(ConfigError, match="two tables have one name"):
        Journal(tmp_path, (SPECS[0], SPECS[0]), Keeping(memory_bytes=BUDGET))


def test_a_snapshot_that_was_altered_is_refused(tmp_path):
    journal = undisturbed(tmp_path, [push_of(0)])
    path = journal.snapshot()
    journal.close()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreFault, match="cannot be read"):
        opened(tmp_path)


def fits(journal, push):
    try:
        return journal.push(push) is Verdict.NEW
    except StoreFault:
        return False


def test_a_full_disk_refuses_pushes_and_snapshots_and_loses_nothing(small_disk, tmp_path):
    disk = small_disk("1m")
    journal = opened(disk)
    step = next(step for step in range(10_000) if not fits(journal, push_of(step)))
    assert step > 50 and journal.applier.book.cursor(0) == 8 * step
    with pytest.raises(StoreFault, match="could not be written"):
        journal.snapshot()
    with pytest.raises(StoreFault, match="takes no more: No space left"):
        journal.push(push_of(step))
    equal(journal, undisturbed(tmp_path / "calm", [push_of(number) for number in range(step)]))
    journal.close()
    again = opened(disk)
    equal(again, journal)
    again.close()


SHARD = """
import sys
from pathlib import Path
from tests.tables.test_journal import opened, push_of
journal = opened(Path(sys.argv[1]))
for step in range(journal.applier.book.cursor(0) // 8, 400):
    journal.push(push_of(step))
    print(step, flush=True)
    if step % 7 == 6:
        journal.snapshot()
"""


def test_a_process_that_is_killed_loses_nothing_that_it_has_acknowledged(tmp_path):
    reached = -1
    for wanted in (10, 25, 31, 52):
        words = [sys.executable, "-c", SHARD, str(tmp_path / "killed")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as shard:
            assert shard.stdout is not None
            for line in shard.stdout:
                reached = int(line)
                if reached >= wanted:
                    shard.kill()
                    break
            rest = shard.stdout.read().split()
            reached = int(rest[-1]) if rest else reached
        journal = opened(tmp_path / "killed")
        applied = journal.applier.book.cursor(0) // 8
        assert reached + 1 <= applied <= reached + 2, "what is acknowledged is kept; the next may be in the log already"
        equal(journal, undisturbed(tmp_path / f"calm-{wanted}", [push_of(step) for step in range(applied)]))
        journal.close()
