"""Ids that expire by event time where pushes are applied: at moments that follow from the pushes alone."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.tables import SGD, TableSpec
from shoal.tables.consistency import Async, Sync
from shoal.tables.frame import Begin, Part, Push
from shoal.tables.journal import Journal, Keeping
from shoal.tables.spec import NUM_BUCKETS

SPEC = TableSpec(name="a", dim=1, rule=SGD(lr=1.0), initial_scale=0.0, expire_after_s=80)
CONSISTENCIES = pytest.mark.parametrize("consistency", [Async(), Sync()], ids=["async", "sync"])


def opened(folder, consistency):
    journal = Journal(folder, [SPEC], Keeping(consistency=consistency, memory_bytes=1 << 20))
    if not journal.applier.generation:
        journal.begin(Begin(1, 0))
    return journal


def push(journal, step, ids, now_s):
    ids = np.array(ids)
    part = Part("a", ids, -np.ones((len(ids), 1), np.float32))
    journal.push(Push(1, {0: (step, step + 1)}, [part], now_s))


def held(journal):
    table = journal.tables["a"]
    return {int(i): float(table.pull(np.array([i]))[0, 0]) for i in table.image().by_id().ids}


@CONSISTENCIES
def test_ids_that_were_not_pushed_for_so_long_are_gone_and_begin_anew(tmp_path, consistency):
    journal = opened(tmp_path, consistency)
    for step, (ids, now_s) in enumerate([([1, 2], 1000), ([1], 1050), ([3], 1095)]):
        push(journal, step, ids, now_s)
    assert held(journal) == {1: 2.0, 3: 1.0}  # at 1090 those last seen before 1010 are gone
    push(journal, 3, [2], 1139)
    assert held(journal) == {1: 2.0, 2: 1.0, 3: 1.0}
    push(journal, 4, [3], 1140)
    assert held(journal) == {2: 1.0, 3: 2.0}


@CONSISTENCIES
def test_a_log_that_is_replayed_and_a_snapshot_expire_the_same(tmp_path, consistency):
    random = np.random.default_rng(0)
    pushes = [(np.unique(random.integers(0, 60, 5)), 1000 + 7 * step) for step in range(60)]
    whole = opened(tmp_path / "whole", consistency)
    for step, (ids, now_s) in enumerate(pushes):
        push(whole, step, ids, now_s)
    other = opened(tmp_path / "other", consistency)
    for step, (ids, now_s) in enumerate(pushes):
        push(other, step, ids, now_s)
        if step in (20, 33):
            other.snapshot()
        if step % 9 == 0:
            other.close()
            other = opened(tmp_path / "other", consistency)
    assert held(other) == held(whole) and 0 < len(held(whole)) < 60


def test_a_step_that_is_taken_back_has_what_had_expired_again(tmp_path):
    journal = opened(tmp_path, Sync())
    push(journal, 0, [1, 2], 1000)
    before = held(journal)
    push(journal, 1, [3], 2000)
    assert held(journal) == {3: 1.0}
    np.testing.assert_array_equal(journal.pull("a", [1, 2, 3], 1), [[1.0], [1.0], [0.0]])
    journal.begin(Begin(2, 1))
    assert held(journal) == before == {1: 1.0, 2: 1.0}


@CONSISTENCIES
def test_what_expires_while_buckets_move_has_expired_where_they_come_to(tmp_path, consistency):
    source, target = opened(tmp_path / "source", consistency), opened(tmp_path / "target", consistency)
    everything = np.ones(NUM_BUCKETS, np.bool_)
    push(source, 0, [1, 2], 1000)
    push(source, 1, [2], 1060)
    first = source.hand_over(everything, {})
    target.take_over(first)
    since = {"a": source.tables["a"].clock if consistency == Async() else 1}
    push(source, 2, [3], 1100)
    target.take_over(*source.let_go(everything, since))
    assert held(target) == held(source) == {2: 2.0, 3: 1.0}


def test_the_step_before_can_be_read_where_nothing_was_pushed_and_nothing_has_expired(tmp_path):
    journal = opened(tmp_path, Sync())
    push(journal, 0, [1], 1000)
    push(journal, 1, [], 1015)
    np.testing.assert_array_equal(journal.pull("a", [1, 2], 1), [[1.0], [0.0]])
