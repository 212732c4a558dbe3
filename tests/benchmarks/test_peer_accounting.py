from __future__ import annotations

from typing import Any

from benchmarks.peers.accounting import cost_of

Facts = list[dict[str, Any]]


def step(t: float, number: int, group: str, shares: dict[int, list[int]], committed_by: list[int]) -> Facts:
    """A step that the ranks offered their shares to; some of them lived to commit it."""
    fact = {"step": number, "group": group}
    offers = [{**fact, "event": "offer", "t": t - 0.1, "rank": r, "samples": ids} for r, ids in shares.items()]
    return offers + [{**fact, "event": "commit", "t": t, "rank": r} for r in committed_by]


def test_a_roll_back_redoes_steps_but_loses_and_repeats_no_sample() -> None:
    facts = step(1, 1, "a", {0: [0], 1: [1]}, [0, 1]) + step(2, 2, "a", {0: [2], 1: [3]}, [0, 1])
    facts += step(5, 2, "b", {0: [2], 1: [3]}, [0, 1]) + step(6, 3, "b", {0: [4], 1: [5]}, [0, 1])
    cost = cost_of(facts, 2.5, 6)
    assert cost is not None
    assert (cost.recovery_s, cost.caught_up_s, cost.lost_steps) == (2.5, 3.5, 1)
    assert (cost.samples_lost, cost.samples_repeated) == (0, 0)


def test_going_on_without_the_dead_loses_its_share() -> None:
    facts = step(1, 1, "a", {0: [0], 1: [1]}, [0, 1]) + step(3, 2, "b", {0: [2]}, [0])
    cost = cost_of(facts, 1.5, 4)
    assert cost is not None
    assert (cost.recovery_s, cost.caught_up_s, cost.lost_steps) == (1.5, 1.5, 0)
    assert (cost.samples_lost, cost.samples_repeated) == (1, 0)


def test_a_step_that_the_old_group_ends_after_the_kill_is_no_recovery() -> None:
    facts = step(1, 1, "a", {0: [0], 1: [1]}, [0, 1]) + step(2, 2, "a", {0: [2], 1: [3]}, [0])
    facts += step(4, 3, "b", {0: [4]}, [0])
    cost = cost_of(facts, 1.9, 5)
    assert cost is not None
    assert cost.recovery_s == 2.1
    assert cost.samples_lost == 0


def test_an_offer_that_no_one_committed_does_not_count() -> None:
    facts = step(1, 1, "a", {0: [0], 1: [1]}, [0, 1]) + step(2, 2, "a", {0: [2], 1: [3]}, [])
    facts += step(4, 2, "b", {0: [2]}, [0])
    cost = cost_of(facts, 1.5, 4)
    assert cost is not None
    assert cost.samples_lost == 1


def test_a_share_taken_twice_is_repeated() -> None:
    facts = step(1, 1, "a", {0: [0], 1: [1]}, [0, 1]) + step(4, 2, "b", {0: [1], 1: [2]}, [0, 1])
    cost = cost_of(facts, 1.5, 3)
    assert cost is not None
    assert (cost.samples_lost, cost.samples_repeated) == (0, 1)


def test_no_step_after_the_kill_is_no_recovery_at_all() -> None:
    assert cost_of(step(1, 1, "a", {0: [0]}, [0]), 1.5, 1) is None
