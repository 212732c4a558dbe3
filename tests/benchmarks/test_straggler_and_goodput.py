from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.goodput import capacity
from benchmarks.lab_runs import Commits, Phase, lanes_of, lost_and_repeated, pids_by_host
from benchmarks.straggler import Turn, figures_of

Events = list[dict[str, Any]]


def commits(*pairs: tuple[float, int]) -> Commits:
    return Commits.of([{"kind": "progress", "at_s": at_s, "step": step} for at_s, step in pairs])


def event(at_s: float, kind: str, **rest: Any) -> dict[str, Any]:
    return {"at_s": at_s, "kind": kind, **rest}


def turn(undisturbed: float, disturbed: float, again: float, static: float, settle_s: float | None = 1.0) -> Turn:
    return Turn(undisturbed, disturbed, again, static, settle_s, 1.0, 2, lanes=[18, 10, 18, 18], lanes_again=[16] * 4)


def test_a_rate_counts_the_parts_of_steps_at_both_ends_of_its_window() -> None:
    assert commits((0, 0), (2, 8), (4, 16), (6, 24)).steps_per_s(1, 5) == 4.0


def test_a_stall_at_the_end_of_a_window_counts() -> None:
    assert commits((0, 0), (1, 10)).steps_per_s(0, 2) == 5.0


def test_a_step_that_is_committed_once_more_counts_once() -> None:
    assert commits((0, 0), (1, 1), (2, 1), (3, 2)) == Commits((0, 1, 3), (0, 1, 2))


def test_the_longest_gap_may_reach_out_of_its_window() -> None:
    found = commits((0, 0), (3, 1), (4, 2))
    assert found.longest_gap(2, 4) == 3
    assert found.longest_gap(3.5, 9) == 5, "it has not ended yet"


@pytest.mark.parametrize(("least_per_s", "after_s"), [(1.0, 0.0), (4.0, 4.0), (9.0, None)])
def test_a_rate_is_reached_with_the_first_window_that_has_it(least_per_s: float, after_s: float | None) -> None:
    slow_then_fast = commits(*((t, t) for t in range(5)), *((4 + t / 4, 4 + t) for t in range(1, 21)))
    assert slow_then_fast.settled_after(0, 8, least_per_s) == after_s


def test_the_end_of_a_phase_is_no_longer_than_the_phase() -> None:
    assert Phase(10, 14).last(3) == Phase(11, 14)
    assert Phase(10, 14).last(30) == Phase(10, 14)


def test_a_phase_counts_only_what_it_saw() -> None:
    events = [event(1, "lost"), event(2, "lost"), event(3, "dismissed"), event(4, "lost")]
    assert Phase(1, 3).count(events, "lost", "dismissed") == 2


def test_who_was_given_up_has_no_process_any_more() -> None:
    events = [event(n, "joined", worker=f"w{n}", host=f"h{n % 2}", pid=n) for n in range(2)]
    events += [event(2, "lost", worker="w0"), event(3, "joined", worker="w2", host="h0", pid=2)]
    assert pids_by_host(events) == {"h1": 1, "h0": 2}


def test_lanes_are_those_of_the_last_deal() -> None:
    events: Events = [event(1, "generation", lanes={"a": 32, "b": 32}), event(2, "deal", lanes={"a": 40, "b": 24})]
    assert lanes_of([*events, event(3, "progress", step=1)]) == {"a": 40, "b": 24}
    assert lanes_of([]) == {}


def test_capacity_is_the_part_of_the_workers_that_had_lanes() -> None:
    lanes = {"a": 16, "b": 16, "c": 16, "d": 16}
    events = [event(0, "generation", lanes=lanes), event(10, "lost", worker="d")]
    events += [event(11, "generation", lanes={"a": 22, "b": 21, "c": 21, "e": 0}), event(14, "deal", lanes=lanes)]
    assert capacity(events, Phase(10, 20)) == pytest.approx((4 * 0.75 + 6) / 10)
    assert capacity(events, Phase(2, 8)) == 1.0


@pytest.mark.parametrize(
    ("counts", "due", "found"),
    [
        ([1, 1, 1, 0], 3, (0, 0)),
        ([2, 2, 2, 2], 8, (0, 0)),
        ([1, 1, 0, 0], 3, (1, 0)),
        ([2, 2, 1, 0], 6, (1, 0)),
        ([2, 1, 1, 1], 4, (0, 1)),
        ([3, 1, 1, 1], 6, (0, 1)),
        ([2, 2, 2, 0.5], 7, (1, 0)),
    ],
)
def test_no_two_samples_may_differ_by_more_than_one_commit(
    counts: Sequence[float], due: int, found: tuple[int, int]
) -> None:
    assert lost_and_repeated(counts, due) == found


def test_speedup_is_over_the_static_run_while_one_host_is_slow() -> None:
    found = figures_of([turn(100, 80, 99, 32), turn(100, 80, 97, 32), turn(100, 60, 98, 32)])
    assert found["speedup_vs_static"] == 2.5
    assert found["recovered_over_undisturbed"] == 0.98


def test_a_rate_that_was_not_reached_in_each_turn_has_no_time() -> None:
    assert figures_of([turn(100, 80, 99, 32), turn(100, 80, 99, 32, settle_s=None)])["settle_s"] is None
