"""Sync, Bounded and Async on tables alone: what a read sees, what is taken back, and that order makes no difference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shoal.errors import ConfigError, Diverged, Fault, StoreFault
from shoal.tables import Adagrad, Adam, TableSpec
from shoal.tables.book import Verdict
from shoal.tables.consistency import NOW, Async, Bounded, Sync
from shoal.tables.frame import Begin, Part, Push
from shoal.tables.journal import Journal, Keeping
from shoal.tables.stored import tables_at

SPECS = (
    TableSpec(name="a", dim=3, rule=Adam(lr=0.1), dtype="bfloat16", admit_after=2, expire_after_s=2),
    TableSpec(name="b", dim=2, rule=Adagrad(lr=0.1)),
)
NUM_LANES = 4
ALL = np.arange(40)


def opened(folder, consistency=Sync(), **how):  # noqa: B008
    keeping = Keeping(consistency=consistency, num_lanes=NUM_LANES, memory_bytes=1 << 22, **how)
    journal = Journal(folder, SPECS, keeping)
    if journal.applier.generation == 0:
        journal.begin(Begin(1, 0))
    return journal


def push_of(step, lane, generation=1):
    random = np.random.default_rng([step, lane])
    parts = []
    for spec in SPECS:
        ids = np.unique(random.integers(0, 40, 9))
        parts.append(Part(spec.name, ids, random.standard_normal((len(ids), spec.dim), dtype=np.float32)))
    return Push(generation, {lane: (step, step + 1)}, parts, now_s=step)


def together(step, lanes, generation=1):
    """Those of some lanes, as one."""
    parts = [part for lane in lanes for part in push_of(step, lane).parts]
    return Push(generation, dict.fromkeys(lanes, (step, step + 1)), parts, now_s=step)


def images(journal):
    return {
        name: [array.tolist() for array in table.image().by_id().arrays().values()] + [table.clock]
        for name, table in journal.tables.items()
    }


def run(journal, steps, generation=1):
    for step in steps:
        for lane in range(NUM_LANES):
            assert journal.push(push_of(step, lane, generation)) is Verdict.NEW


def test_the_order_in_which_a_steps_pushes_come_makes_no_difference(tmp_path):
    found = []
    for number, order in enumerate(itertools.permutations(range(NUM_LANES))):
        journal = opened(tmp_path / str(number))
        for step in range(3):
            for lane in order:
                assert journal.push(push_of(step, lane)) is Verdict.NEW
        found.append(images(journal))
    assert all(other == found[0] for other in found)


def test_a_step_is_seen_once_all_of_it_is_there_and_the_one_before_it_still(tmp_path):
    journal = opened(tmp_path)
    run(journal, range(2))
    before = journal.pull("b", ALL, 2)
    for lane in range(NUM_LANES - 1):
        journal.push(push_of(2, lane))
        assert not journal.applier.is_ready(3)
        np.testing.assert_array_equal(journal.pull("b", ALL, 2), before)
    journal.push(push_of(2, NUM_LANES - 1))
    assert journal.applier.is_ready(3) and journal.applier.step == 3
    after = journal.pull("b", ALL, 3)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(journal.pull("b", ALL, NOW), after)
    np.testing.assert_array_equal(journal.pull("b", ALL, 2), before)
    np.testing.assert_array_equal(journal.pull("b", ALL[::-1], 2), before[::-1])
    with pytest.raises(Fault, match="step 1 cannot be read any more: the tables are at step 3"):
        journal.pull("b", ALL, 1)


def test_a_push_of_lanes_that_are_there_in_part_is_amiss(tmp_path):
    journal = opened(tmp_path)
    assert journal.push(together(0, [0, 1])) is Verdict.NEW
    assert journal.push(together(0, [1, 0])) is Verdict.KNOWN
    assert journal.push(push_of(0, 1)) is Verdict.KNOWN
    assert journal.push(together(0, [1, 2])) is Verdict.AMISS
    assert journal.push(push_of(1, 2)) is Verdict.AMISS
    assert journal.push(push_of(0, 2, generation=0)) is Verdict.ZOMBIE
    assert journal.push(together(0, [2, 3])) is Verdict.NEW
    assert journal.push(push_of(0, 2)) is Verdict.KNOWN
    assert journal.applier.step == 1


@pytest.mark.parametrize("again", [False, True], ids=["", "opened again"])
@pytest.mark.parametrize("base", [4, 5])
def test_a_generation_begins_where_the_others_are_and_what_was_begun_is_done_again(tmp_path, base, again):
    calm = opened(tmp_path / "calm")
    run(calm, range(8))
    journal = opened(tmp_path / "other")
    run(journal, range(5))
    journal.push(push_of(5, 2))
    if again:
        journal.snapshot()
        journal.push(push_of(5, 0))
        journal.close()
        journal = opened(tmp_path / "other")
    assert journal.begin(Begin(2, base)) is Verdict.NEW
    assert journal.begin(Begin(2, base)) is Verdict.KNOWN
    assert journal.begin(Begin(1, base)) is Verdict.ZOMBIE
    assert journal.push(push_of(base, 2)) is Verdict.ZOMBIE
    assert journal.applier.step == base
    if again:
        journal.close()
        journal = opened(tmp_path / "other")
        assert (journal.applier.step, journal.applier.generation) == (base, 2)
    run(journal, range(base, 8), generation=2)
    assert images(journal) == images(calm)


@pytest.mark.parametrize("base", [2, 4, 9])
def test_a_generation_cannot_begin_where_the_tables_cannot_be(tmp_path, base):
    journal = opened(tmp_path)
    run(journal, range(3))
    journal.begin(Begin(2, 2))
    assert journal.begin(Begin(3, base)) is (Verdict.NEW if base == 2 else Verdict.AMISS)
    assert journal.begin(Begin(4, 1)) is Verdict.AMISS


def test_a_push_of_a_generation_that_has_not_begun_is_amiss(tmp_path):
    journal = opened(tmp_path)
    assert journal.push(push_of(0, 0, generation=2)) is Verdict.AMISS
    journal.begin(Begin(2, 0))
    assert journal.push(push_of(0, 0, generation=2)) is Verdict.NEW
    assert journal.begin(Begin(2, 0)) is Verdict.KNOWN
    assert journal.push(push_of(0, 0, generation=2)) is Verdict.KNOWN


@pytest.mark.parametrize("durability", ["log", "snapshot"])
@pytest.mark.parametrize("base", [0, 2, 4])
def test_a_generation_begins_from_a_mark_however_far_the_tables_have_gone_on(tmp_path, base, durability):
    calm = opened(tmp_path / "calm")
    run(calm, range(9))
    journal = opened(tmp_path / "other", durability=durability)
    run(journal, range(2))
    journal.mark(2)
    run(journal, range(2, 5))
    journal.push(push_of(5, 1))
    journal.mark(4, keep=[2])
    for lane in (0, 2, 3):
        journal.push(push_of(5, lane))
    journal.snapshot()
    run(journal, range(6, 8))
    if durability == "log":
        journal.close()
        journal = opened(tmp_path / "other", durability=durability)
    assert journal.begin(Begin(2, base)) is Verdict.NEW
    assert journal.applier.step == base
    run(journal, range(base, 9), generation=2)
    assert images(journal) == images(calm)
    assert journal.begin(Begin(3, 3)) is Verdict.AMISS
    with pytest.raises(ConfigError, match="the tables are at step 9, and step 4 was to be marked"):
        journal.mark(4)


def test_what_was_marked_and_is_not_kept_is_forgotten(tmp_path):
    journal = opened(tmp_path)
    for step in range(6):
        run(journal, [step])
        journal.mark(step + 1, keep=[step])
        journal.snapshot()
    assert sorted(path.name for path in tmp_path.glob("snapshot-*")) == [f"snapshot-{n}.safetensors" for n in (4, 5, 6)]
    assert journal.begin(Begin(2, 3)) is Verdict.AMISS
    assert journal.begin(Begin(2, 5)) is Verdict.NEW


def test_a_snapshot_in_the_middle_of_a_step_changes_nothing(tmp_path):
    calm = opened(tmp_path / "calm")
    run(calm, range(6))
    journal = opened(tmp_path / "other")
    for step in range(6):
        for lane in range(NUM_LANES):
            journal.push(push_of(step, lane))
            if (step + lane) % 3 == 0:
                journal.snapshot()
            if (step + lane) % 4 == 0:
                journal.close()
                journal = opened(tmp_path / "other")
    assert images(journal) == images(calm)


def test_bounded_answers_no_read_that_is_ahead_of_the_slowest_lane_by_more(tmp_path):
    journal = opened(tmp_path, Bounded(2))
    assert [journal.applier.is_ready(step) for step in (0, 2, 3)] == [True, True, False]
    for lane in range(NUM_LANES - 1):
        for step in range(3):
            journal.push(push_of(step, lane))
    assert not journal.applier.is_ready(3)
    journal.push(push_of(0, NUM_LANES - 1))
    assert [journal.applier.is_ready(step) for step in (3, 4)] == [True, False]
    assert journal.applier.step == 1


def test_async_answers_at_once_and_applies_at_once(tmp_path):
    journal = opened(tmp_path, Async())
    before = journal.pull("b", ALL, 900)
    journal.push(push_of(0, 3))
    assert not np.array_equal(journal.pull("b", ALL, 900), before)
    assert journal.begin(Begin(2, 0)) is Verdict.NEW
    assert journal.push(push_of(1, 3)) is Verdict.ZOMBIE


@pytest.mark.parametrize(("make", "message"), [(lambda: Bounded(-1), "from 0 on"), (lambda: Async(0), "from 1 on")])
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_steps_sum_that_is_not_finite_is_refused_before_it_is_logged(tmp_path):
    journal = opened(tmp_path)
    huge = np.full((1, 2), 1e38, np.float32)
    for lane in range(NUM_LANES):
        push = Push(1, {lane: (0, 1)}, [Part("b", np.array([7]), huge)])
        if lane < NUM_LANES - 1:
            assert journal.push(push) is Verdict.NEW
        else:
            with pytest.raises(Diverged, match=r"not finite.*a sum over lanes, of step 0"):
                journal.push(push)
    journal.close()
    again = opened(tmp_path)
    assert again.applier.step == 0
    assert again.push(Push(1, {NUM_LANES - 1: (0, 1)}, [])) is Verdict.NEW


def test_a_read_of_the_step_before_is_answered_where_that_touched_nothing(tmp_path):
    journal = opened(tmp_path)
    for lane in range(NUM_LANES):
        journal.push(Push(1, {lane: (0, 1)}, [Part("b", np.empty(0, np.int64), np.empty((0, 2), np.float32))]))
    np.testing.assert_array_equal(journal.pull("b", ALL, 0), journal.pull("b", ALL, 1))


def test_a_mark_stays_until_a_newer_version_is_stored(tmp_path):
    journal = opened(tmp_path)
    run(journal, range(2))
    journal.mark(2)
    run(journal, range(2, 4))
    journal.mark(4, keep=[])  # 2 is still being written
    run(journal, range(4, 6))
    journal.mark(6, keep=[4])
    assert journal.can_begin(Begin(2, 2)) is Verdict.AMISS
    assert journal.can_begin(Begin(2, 4)) is Verdict.NEW


def test_a_snapshot_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    calm = opened(tmp_path / "calm")
    run(calm, range(4))
    journal = opened(tmp_path / "other")
    run(journal, range(3))
    journal.push(push_of(3, 1))
    with monkeypatch.context() as patch:
        patch.setattr("shoal.tables.journal.flush", _raise)
        for _ in range(2):
            with pytest.raises(StoreFault, match="could not be written"):
                journal.snapshot()
    journal.snapshot()
    for lane in (0, 2, 3):
        assert journal.push(push_of(3, lane)) is Verdict.NEW
    journal.close()
    assert images(opened(tmp_path / "other")) == images(calm)


def _raise(path):
    raise OSError("the disk says no")


def test_two_processes_do_not_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.tables.files._LOCKED_S", 0.1)
    journal = opened(tmp_path)
    with pytest.raises(ConfigError, match="another process writes to"):
        opened(tmp_path)
    journal.close()
    opened(tmp_path).close()


def test_tables_of_other_lanes_are_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ConfigError, match="is of a job with 4 lanes, not 5"):
        Journal(tmp_path, SPECS, Keeping(consistency=Sync(), num_lanes=5))


def test_a_log_that_is_damaged_before_a_mark_is_not_read_as_the_version(tmp_path):
    journal = opened(tmp_path)
    run(journal, range(3))
    journal.mark(3)
    assert tables_at(tmp_path, 3)["b"].clock == journal.tables["b"].clock
    path = tmp_path / "log-0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreFault, match="is damaged at byte"):
        tables_at(tmp_path, 3)
    path.write_bytes(data[:-10])
    with pytest.raises(StoreFault, match="is damaged at byte"):
        tables_at(tmp_path, 3)
