"""The machine by example: one short history each, and each that once went wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest

from shoal.membership import (
    NOTHING,
    Announce,
    Attached,
    Await,
    DeadlinePassed,
    DealTaken,
    Dismiss,
    End,
    Finished,
    Halt,
    Healed,
    Joined,
    LeaveAsked,
    Lost,
    Origin,
    Phase,
    Redeal,
    Reported,
    Rules,
    Scaled,
    Stalled,
    Standing,
    Stored,
    World,
    begin,
    step,
    take_over,
)
from shoal.membership.balance import Balance, Cost
from shoal.membership.changes import Measured

A, B, C, D = "abcd"
TWO = Rules(num_lanes=4, min_workers=1, max_workers=2, total_steps=10)
FOUR = Rules(num_lanes=4, min_workers=1, max_workers=4, total_steps=10)


def after(state, *events):
    """The state after these events, and what the last one led to."""
    actions = []
    for event in events:
        state, actions = step(state, event)
    return state, actions


def running(rules, *workers, stored=NOTHING):
    state, _ = after(begin(rules, len(workers), stored), *(Joined(worker) for worker in workers))
    assert state.phase is Phase.RUNNING
    return state


def reports(state, **steps):
    """Every named member's report that it stopped at this step."""
    return [Reported(w, state.generation, Standing(at, f"v{at}")) for w, at in steps.items()]


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def world_of(actions):
    (announced,) = only(actions, Announce)
    return announced.world


# Beginning


def test_a_run_begins_when_as_many_as_wanted_have_joined():
    state, actions = after(begin(TWO, 2), Joined(A))
    assert actions == [Await(Phase.GATHERING, 0)] and state.phase is Phase.GATHERING
    world = world_of(after(state, Joined(B))[1])
    assert world.members == (A, B) and world.generation == 1
    assert world.origin is Origin.SEED and world.base.step == 0 and not world.sources


def test_when_time_is_up_it_begins_with_as_few_as_the_rules_allow():
    state, actions = after(begin(TWO, 2), Joined(A), DeadlinePassed(Phase.GATHERING, 0))
    assert world_of(actions).members == (A,) and state.phase is Phase.RUNNING


def test_with_fewer_than_the_rules_allow_it_waits_however_long():
    rules = Rules(num_lanes=4, min_workers=2, max_workers=2, total_steps=10)
    state, actions = after(begin(rules, 2), Joined(A), DeadlinePassed(Phase.GATHERING, 0))
    assert actions == [] and world_of(after(state, Joined(B))[1]).members == (A, B)


def test_a_stored_version_is_where_a_new_run_goes_on():
    world = running(TWO, A, B, stored=Standing(7, "v7")).world
    assert world.origin is Origin.STORE and world.base == Standing(7, "v7") and not world.sources


# Faults


def test_a_lost_member_halts_the_others_at_once_and_its_lanes_are_dealt_out():
    state, actions = after(running(TWO, A, B), Lost(B, "killed"))
    assert actions[0] == Dismiss(B, "killed", expelled=True)
    assert only(actions, Halt) == [Halt(1, (A,), at_boundary=False)]
    world = world_of(after(state, *reports(state, a=3))[1])
    assert world.lanes == {A: (0, 1, 2, 3)} and world.base == Standing(3, "v3")


def test_who_is_a_step_behind_copies_from_who_is_ahead_and_has_no_lanes_meanwhile():
    state, _ = after(running(FOUR, A, B, C), Lost(C, "killed"))
    state, actions = after(state, *reports(state, a=4, b=3))
    world = world_of(actions)
    assert world.sources == {B: A} and world.lanes[B] == ()
    redeal = only(after(state, Healed(B, state.generation))[1], Redeal)
    assert len(redeal) == 1 and len(redeal[0].lanes[B]) == 2


def test_lanes_that_lost_their_worker_are_spread_over_all_when_a_newcomer_gets_its_share():
    rules = Rules(num_lanes=36, min_workers=1, max_workers=4, total_steps=10)
    state = running(rules, A, B, C)
    lost = set(state.world.lanes[C])
    state, _ = after(state, Lost(C, "killed"))
    state, _ = after(state, *reports(state, a=4, b=4))
    state, _ = after(state, Joined(D))
    state, _ = after(state, *reports(state, a=5, b=5))
    assert state.world.lanes[D] == ()
    (redeal,) = only(after(state, Healed(D, state.generation))[1], Redeal)
    assert counts(redeal.lanes) == {A: 12, B: 12, D: 12}
    assert {worker: len(lost & set(lanes)) for worker, lanes in redeal.lanes.items()} == {A: 4, B: 4, D: 4}


def test_members_that_hold_less_than_the_store_load_from_it():
    state, _ = after(running(FOUR, A, B), Stored(Standing(8, "v8")), Lost(B, "killed"))
    world = world_of(after(state, *reports(state, a=6))[1])
    assert world.origin is Origin.STORE and world.base == Standing(8, "v8") and not world.sources


def test_a_second_loss_while_a_planned_halt_is_awaited_makes_it_immediate():
    state, actions = after(running(FOUR, A, B, C), LeaveAsked(A))
    assert only(actions, Halt) == [Halt(1, (A, B, C), at_boundary=True, leaving=(A,))]
    _, actions = after(state, Lost(B, "killed"))
    assert only(actions, Halt) == [Halt(1, (A, C), at_boundary=False)]


def test_a_report_that_was_not_asked_for_halts_the_others():
    state = running(TWO, A, B)
    state, actions = after(state, *reports(state, a=3))
    assert only(actions, Halt) == [Halt(1, (B,), at_boundary=False)] and state.phase is Phase.HALTING


def test_who_does_not_report_in_time_is_left_behind():
    state, _ = after(running(FOUR, A, B, C), Lost(C, "killed"))
    state, actions = after(state, *reports(state, a=3), DeadlinePassed(Phase.HALTING, 1))
    assert only(actions, Dismiss) == [Dismiss(B, "it did not report in time", expelled=True)]
    assert world_of(actions).members == (A,)


def test_a_stranger_that_reports_is_sent_away():
    _, actions = after(running(TWO, A, B), Reported(C, 1, Standing(9, "zombie")))
    assert [action.worker for action in only(actions, Dismiss)] == [C]


def test_a_cut_link_sends_away_the_member_that_holds_less():
    state, actions = after(running(TWO, A, B), Stalled(1))
    assert only(actions, Halt) == [Halt(1, (A, B), at_boundary=False, probe=True)]
    reported = Reported(A, 1, Standing(5, "v5"), frozenset({B})), Reported(B, 1, Standing(4, "v4"), frozenset({A}))
    world = world_of(after(state, *reported)[1])
    assert world.members == (A,)


# Coming, going, scaling


def test_where_work_outlives_a_generation_a_newcomer_enters_at_once():
    rules = Rules(num_lanes=4, min_workers=1, max_workers=4, total_steps=10, in_rounds=True)
    _, actions = after(running(rules, A), Scaled(2), Joined(B))
    assert only(actions, Halt) == [Halt(1, (A,), at_boundary=False)]


def test_a_newcomer_enters_at_a_boundary_and_copies_while_the_others_train():
    state = running(FOUR, A)
    state, actions = after(state, Scaled(2), Joined(B))
    assert only(actions, Halt) == [Halt(1, (A,), at_boundary=True)]
    world = world_of(after(state, *reports(state, a=5))[1])
    assert world.members == (A, B) and world.sources == {B: A} and world.lanes == {A: (0, 1, 2, 3), B: ()}


def test_a_newcomer_that_is_not_wanted_waits_until_one_is_lost():
    state, actions = after(running(TWO, A, B), Joined(C))
    assert actions == []
    state, _ = after(state, Lost(B, "killed"))
    assert world_of(after(state, *reports(state, a=5))[1]).members == (A, C)


def test_a_newcomer_that_cannot_reach_the_members_waits_until_it_can():
    state, actions = after(running(FOUR, A), Scaled(2), Joined(B, frozenset({A})))
    assert actions == []
    assert only(after(state, Joined(B))[1], Halt)


def test_fewer_wanted_means_that_the_last_ranks_leave():
    state, actions = after(running(FOUR, A, B, C), Scaled(1))
    assert only(actions, Halt) == [Halt(1, (A, B, C), at_boundary=True, leaving=(B, C))]
    _, actions = after(state, *reports(state, a=5, b=5, c=5))
    assert {(d.worker, d.expelled) for d in only(actions, Dismiss)} == {(B, False), (C, False)}
    assert world_of(actions).members == (A,)


def test_one_deal_is_in_flight_at_a_time_and_the_next_waits_for_it():
    state, _ = after(running(FOUR, A), Scaled(3), Joined(B), Joined(C))
    state, _ = after(state, *reports(state, a=5))
    state, actions = after(state, Healed(B, 2))
    assert [deal.number for deal in only(actions, Redeal)] == [1]
    state, actions = after(state, Healed(C, 2))
    assert actions == []
    _, actions = after(state, DealTaken(2, 1))
    assert [deal.number for deal in only(actions, Redeal)] == [2] and all(actions[0].lanes.values())


# Lanes that move


WIDE = Rules(num_lanes=64, min_workers=1, max_workers=4, total_steps=10)


def measures(state, first_s=0.0, **lane_s):
    """Four measures in two seconds, under the present deal; a second a lane unless told otherwise."""
    lanes = state.world.lanes
    costs = {w: Cost(len(lanes[w]) * lane_s.get(w, 1.0), len(lanes[w])) for w in state.members}
    return [Measured(state.generation, first_s + i / 2, costs) for i in range(4)]


def moved(*workers, **lane_s):
    """A state in which a slow worker's lanes have just moved."""
    state = running(WIDE, *workers)
    return after(state, *measures(state, **lane_s)[:3])


def counts(lanes):
    return {worker: len(own) for worker, own in lanes.items()}


def test_a_slow_member_is_relieved_of_lanes_and_no_other_lane_moves():
    before = running(WIDE, A, B, C, D).world.lanes
    state, actions = moved(A, B, C, D, d=3.0)
    (redeal,) = only(actions, Redeal)
    assert redeal.reason == "balance" and redeal.members == (A, B, C, D)
    assert counts(redeal.lanes) == {A: 20, B: 19, C: 19, D: 6} and state.world.lanes == redeal.lanes
    assert all(set(before[w]) <= set(redeal.lanes[w]) for w in (A, B, C))


def test_while_a_deal_is_in_flight_measures_teach_nothing():
    state, _ = moved(A, B, C, D, d=3.0)
    assert after(state, *measures(state, a=9.0)) == (state, [])
    state, _ = after(state, DealTaken(1, 1))
    assert only(after(state, *measures(state, a=9.0)[:3])[1], Redeal)


def test_a_member_that_has_recovered_gets_its_lanes_back():
    state, _ = moved(A, B, C, D, d=3.0)
    state, _ = after(state, DealTaken(1, 1))
    state, _ = after(state, *measures(state, 10.0))
    assert counts(state.world.lanes) == dict.fromkeys((A, B, C, D), 16)


def test_while_a_member_heals_measures_teach_nothing():
    state, _ = after(running(WIDE, A, B, C), Lost(C, "killed"))
    state, _ = after(state, *reports(state, a=4, b=3))
    assert after(state, *measures(state, a=9.0)) == (state, [])


@pytest.mark.parametrize("change", [{"generation": 0}, {"generation": 2}, {"costs": {}}, {"costs": {A: Cost(1.0, 1)}}])
def test_measures_of_another_world_teach_nothing(change):
    state = running(WIDE, A, B)
    for event in measures(state, b=9.0):
        assert step(state, replace(event, **change)) == (state, [])


def test_a_lone_worker_is_not_measured():
    state = running(WIDE, A)
    assert after(state, *measures(state)) == (state, [])


def test_the_next_generation_is_dealt_by_what_is_known_and_a_newcomer_counts_as_average():
    state, _ = moved(A, B, C, D, d=3.0)
    state, _ = after(state, Lost(A, "killed"), Joined("e"))
    state, actions = after(state, *reports(state, b=3, c=3, d=3))
    assert counts(world_of(actions).lanes) == {B: 28, C: 27, D: 9, "e": 0}
    assert state.balance.paces.keys() == {B, C, D} and not state.balance.recent
    (redeal,) = only(after(state, Healed("e", 2))[1], Redeal)
    assert counts(redeal.lanes) == {B: 21, C: 21, D: 6, "e": 16} and redeal.reason == "healed"


def test_a_replaced_coordinator_knows_no_paces_and_begins_with_equal_shares():
    state, _ = moved(A, B, b=3.0)
    taken, _ = take_over(begin(WIDE, 2), state.world)
    assert taken.balance == Balance()


# The end


def test_a_run_ends_once_all_have_finished_and_the_last_version_is_stored():
    last = Standing(10, "v10")
    state, actions = after(running(TWO, A, B), Finished(A, 1, last), Finished(B, 1, last))
    assert actions == []
    state, actions = after(state, Stored(last))
    assert actions == [End()] and after(state, Joined(C)) == (state, [])


def test_who_finished_in_an_earlier_generation_finishes_again():
    last = Standing(10, "v10")
    state, _ = after(running(TWO, A, B), Stored(last), Finished(A, 1, last), Lost(B, "killed"))
    state, _ = after(state, Reported(A, 1, last))
    assert state.phase is Phase.RUNNING
    assert after(state, Finished(A, 1, last))[1] == []
    assert after(state, Finished(A, 2, last))[1] == [End()]


# What comes late or twice


@pytest.mark.parametrize(
    "event",
    [
        Joined(A),
        Lost(D, "killed long ago"),
        Reported(A, 1, Standing(2, "v2")),
        Healed(B, 1),
        DealTaken(1, 1),
        Stalled(1),
        Measured(1, 9.0, {A: Cost(9.0, 2), B: Cost(1.0, 2)}),
        DeadlinePassed(Phase.HALTING, 1),
        DeadlinePassed(Phase.GATHERING, 0),
        Attached(A, 1, Standing(2, "v2"), halted=True),
    ],
)
def test_an_event_of_an_earlier_generation_changes_nothing(event):
    state, _ = after(running(FOUR, A, B, C), Lost(C, "killed"))
    state, _ = after(state, *reports(state, a=4, b=3))
    assert state.generation == 2 and step(state, event) == (state, [])


# A coordinator that died


def taken_over(*members, generation=3):
    lanes = dict.fromkeys(members, ()) | {members[0]: (0, 1, 2, 3)}
    world = World(generation, members, lanes, Standing(5, "v5"), Origin.PEERS)
    state, actions = take_over(begin(FOUR, len(members)), world)
    assert actions == [Await(Phase.ATTACHING, generation)]
    return state


def test_members_that_go_on_training_are_halted_at_a_boundary_by_the_new_coordinator():
    attached = [Attached(w, 3, Standing(9), halted=False) for w in (A, B)]
    _, actions = after(taken_over(A, B), *attached)
    assert only(actions, Halt) == [Halt(3, (A, B), at_boundary=True)]


def test_members_that_had_stopped_go_on_in_a_generation_of_the_new_coordinators_own():
    attached = [Attached(w, 3, Standing(9, "v9"), halted=True) for w in (A, B)]
    world = world_of(after(taken_over(A, B), *attached)[1])
    assert world.generation == 4 and world.members == (A, B) and world.base == Standing(9, "v9")


def test_a_zombie_of_an_earlier_generation_is_sent_away():
    _, actions = after(taken_over(A, B), Attached(C, 2, Standing(99, "zombie"), halted=True))
    assert [action.worker for action in only(actions, Dismiss)] == [C]


def test_members_that_do_not_come_back_are_left_behind():
    state = taken_over(A, B)
    state, actions = after(state, Attached(A, 3, Standing(9), halted=False), DeadlinePassed(Phase.ATTACHING, 3))
    assert [action.worker for action in only(actions, Dismiss)] == [B]
    assert only(actions, Halt) == [Halt(3, (A,), at_boundary=False)]


# Histories that once went wrong


def test_a_newcomer_that_was_never_told_of_its_world_is_asked_and_not_left_behind():
    """The coordinator recorded generation 3 and died; the next one ignored the newcomer's hello and expelled it."""
    state, _ = after(taken_over(A, B), Attached(A, 3, Standing(9), halted=False))
    state, actions = after(state, Joined(B))
    assert only(actions, Halt) == [Halt(3, (A, B), at_boundary=False)]
    _, actions = after(state, Reported(A, 3, Standing(9, "v9")), Reported(B, 3, NOTHING))
    assert world_of(actions).sources == {B: A}


def test_a_late_hello_of_a_running_member_does_not_make_it_hold_nothing():
    """Taken at its word, a hello that the old coordinator should have had would have planted the model anew."""
    state, _ = after(taken_over(A), Joined(A))
    assert world_of(after(state, Reported(A, 3, Standing(9, "v9")))[1]).base == Standing(9, "v9")


def test_a_cut_link_does_not_outlast_a_planned_halt():
    """The boundary never came, and when time was up every member was sent away."""
    state, _ = after(running(TWO, A, B), LeaveAsked(B))
    state, actions = after(state, Stalled(1))
    assert only(actions, Halt) == [Halt(1, (A, B), at_boundary=False, probe=True)]
    assert after(state, Stalled(1)) == (state, []), "once is enough"


def test_a_planned_halt_that_takes_too_long_becomes_immediate_before_anyone_is_lost():
    """A measurement that outlasted the time for a boundary cost all members their place."""
    state, _ = after(running(TWO, A, B), LeaveAsked(B))
    state, actions = after(state, DeadlinePassed(Phase.HALTING, 1))
    assert actions == [Halt(1, (A, B), at_boundary=False), Await(Phase.HALTING, 1)]
    _, actions = after(state, *reports(state, a=3), DeadlinePassed(Phase.HALTING, 1))
    assert [action.worker for action in only(actions, Dismiss)] == [B]


def test_the_last_holder_of_the_newest_version_leaves_only_when_others_have_copied_it():
    """The only trained worker was dismissed, and the newcomer in its place began from the seed."""
    state, _ = after(running(FOUR, A), Scaled(2), LeaveAsked(A), Joined(B))
    state, actions = after(state, *reports(state, a=5))
    assert world_of(actions).sources == {B: A} and not only(actions, Dismiss)
    state, actions = after(state, Healed(B, 2))
    assert only(actions, Halt) == [Halt(2, (A, B), at_boundary=True, leaving=(A,))]
    _, actions = after(state, *reports(state, a=7, b=7))
    assert only(actions, Dismiss) == [Dismiss(A, "it asked to leave", expelled=False)]
    assert world_of(actions).members == (B,) and world_of(actions).base == Standing(7, "v7")


def test_a_worker_that_leaves_is_not_kept_for_a_version_that_the_store_has():
    state, _ = after(running(FOUR, A), Scaled(2), Stored(Standing(5, "v5")), LeaveAsked(A), Joined(B))
    _, actions = after(state, *reports(state, a=5))
    assert world_of(actions).members == (B,) and world_of(actions).origin is Origin.STORE


def test_a_late_hello_of_who_has_left_brings_no_one_back():
    """It was dealt lanes, and the others waited for a process that had ended."""
    state, _ = after(running(FOUR, A, B), LeaveAsked(B))
    state, _ = after(state, *reports(state, a=3, b=3))
    assert step(state, Joined(B)) == (state, [])


def test_every_event_leaves_the_state_it_was_given_as_it_was():
    events = [Joined(A), Joined(B), Stored(Standing(3, "v3")), Lost(B, "killed"), *reports(running(TWO, A, B), a=3)]
    states = reduce(lambda done, event: [*done, step(done[-1], event)[0]], events, [begin(TWO, 2)])
    again = [step(state, event)[0] for state, event in zip(states, events, strict=False)]
    assert again == states[1:]
