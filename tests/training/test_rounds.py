"""What a round asks of each lane: all that is due, step by step, however far behind the lane is."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import Bug
from shoal.lanes import Ledger, Steps
from shoal.training.round import Progress, expected, feeds, first_of_slot

STEPS = Steps(num_samples=103, global_batch=10, num_lanes=8, epochs=3)
ALL = np.ones(8, np.int64)


def taken(lanes, start, stop):
    """The account of some lanes' samples from one step up to another, step by step."""
    return sum((Ledger.expected(STEPS.span(step), lanes) for step in range(start, stop)), Ledger())


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 11), (5, 29), (10, 12), (0, 33), (7, 7)])
def test_spans_of_many_steps_are_the_steps_together(start, stop):
    together = sum((Ledger.expected(span) for span in STEPS.spans(start, stop)), Ledger())
    assert together == taken(range(8), start, stop)


def test_lanes_are_fed_from_where_they_stand():
    assert feeds((1, 2, 3, 5), 20, {2: 15, 5: 15, 7: 10}) == {20: (1, 3), 15: (2, 5)}


@pytest.mark.parametrize("reached", [20, 15, 8, 0])
def test_the_slots_of_a_round_take_every_step_that_is_due_once(reached):
    progress = Progress(20, 25, [(0,)])
    firsts = [first_of_slot(slot, reached, progress) for slot in range(progress.num_slots + 1)]
    assert firsts[0] == reached and firsts[-1] == 25
    assert max(np.diff(firsts)) - min(np.diff(firsts)) <= 1


def test_a_round_is_expected_to_make_up_for_what_lags():
    found = expected(STEPS, ALL, 12, 15, {3: 7, 4: 7})
    assert found == taken((0, 1, 2, 5, 6, 7), 12, 15) + taken((3, 4), 7, 15)


def test_lanes_that_no_one_did_are_not_expected():
    flags = ALL.copy()
    flags[[2, 6]] = 0
    assert expected(STEPS, flags, 12, 15, {}) == taken((0, 1, 3, 4, 5, 7), 12, 15)


def test_a_lane_done_by_two_is_an_error_of_ours():
    flags = ALL.copy()
    flags[3] = 2
    with pytest.raises(Bug, match=r"the same lanes: \[3\]"):
        expected(STEPS, flags, 0, 1, {})


def test_progress_goes_from_slot_to_slot_and_stage_to_stage():
    progress = Progress(20, 22, [(0, 1), (7,)])
    seen = []
    while not progress.is_done:
        seen.append((progress.stage, progress.slot, progress.lanes_done))
        progress.next_slot()
    assert seen == [(0, 0, ()), (0, 1, ()), (1, 0, (0, 1)), (1, 1, (0, 1))]
    assert progress.lanes_done == (0, 1, 7)


@pytest.mark.parametrize(("done", "target", "left"), [(2, 25, 3), (2, 22, 0), (5, 25, 0), (1, 22, 1)])
def test_progress_may_lead_to_an_earlier_step_once_it_has_begun(done, target, left):
    progress = Progress(20, 25, [(0, 1)])
    for _ in range(done):
        progress.next_slot()
    assert progress.num_done == done
    progress.lead_to(target)
    seen = []
    while not progress.is_done:
        seen.append((first_of_slot(progress.slot, 20, progress), first_of_slot(progress.slot + 1, 20, progress)))
        progress.next_slot()
    assert seen == [(20 + step, 21 + step) for step in range(done, done + left)]
    assert progress.lanes_done == (0, 1)


@pytest.mark.parametrize(
    ("num_slots", "lanes", "fits"), [(5, (0, 1, 9), True), (2, (0, 1), True), (1, (0, 1), False), (5, (0, 9), False)]
)
def test_what_is_done_fits_a_round_that_is_long_enough_and_has_its_lanes(num_slots, lanes, fits):
    progress = Progress(20, 25, [(0, 1)])
    assert not progress.fits(5, (0, 1)), "nothing is done of it"
    progress.next_slot()
    progress.next_slot()
    assert progress.fits(num_slots, lanes) is fits


def test_a_member_without_lanes_has_nothing_to_do():
    assert Progress(20, 25, []).is_done
