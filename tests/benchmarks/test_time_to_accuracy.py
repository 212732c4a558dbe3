"""What is read from a run's events is what happened in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy_traces import Trace, draw, mean_gap_pp, trace
from shoal.events import Event


def events(*accuracies: float, step_s: float = 1.0, evaluation_s: float = 0.5) -> list[Event]:
    """A run that begins at 100 s, and evaluates after every second step."""
    found: list[Event] = [{"at_s": 100.0, "kind": "generation"}]
    now_s = 100.0
    for number, accuracy in enumerate(accuracies, 1):
        now_s += 2 * step_s
        found.append({"at_s": now_s, "kind": "progress", "step": 2 * number, "loss": 1 / number})
        now_s += evaluation_s
        found.append({"at_s": now_s, "kind": "evaluated", "step": 2 * number, "figures": {"accuracy": accuracy}})
    return found


def seconds_to(target: float, run: Trace) -> float | None:
    point = run.first_at(target)
    return point.at_s if point is not None else None


def test_time_counts_from_the_first_generation_and_leaves_evaluation_out() -> None:
    assert seconds_to(0.8, trace("ddp", events(0.5, 0.7, 0.8, 0.9))) == pytest.approx(6.0)


def test_an_accuracy_that_was_never_reached_has_no_time() -> None:
    assert seconds_to(0.95, trace("ddp", events(0.5, 0.9))) is None


def test_events_may_come_in_any_order() -> None:
    assert trace("ddp", events(0.5, 0.7, 0.8)[::-1]) == trace("ddp", events(0.5, 0.7, 0.8))


def test_a_second_generation_does_not_begin_anew() -> None:
    later: Event = {"at_s": 103.0, "kind": "generation"}
    assert seconds_to(0.7, trace("ours", [*events(0.5, 0.7), later])) == pytest.approx(4.0)


def test_a_step_lasts_as_long_as_it_took_without_the_evaluation() -> None:
    assert trace("ddp", events(0.5, 0.7, 0.8, step_s=3.0)).step_s == pytest.approx(3.0)


def test_the_same_optimisation_at_another_step_time_needs_the_same_steps() -> None:
    run = trace("ours", events(0.5, 0.7, 0.8))
    assert seconds_to(0.8, run.at_step_time(10.0, "ddp")) == pytest.approx(60.0)


def test_the_gap_is_positive_where_the_reference_is_better() -> None:
    better, worse = trace("ddp", events(0.5, 0.9)), trace("ours", events(0.5, 0.88))
    assert mean_gap_pp([better], [worse]) == pytest.approx(2.0)


def test_the_gap_is_that_of_the_last_step_that_both_have() -> None:
    longer, shorter = trace("ddp", events(0.5, 0.9, 0.95)), trace("ours", events(0.5, 0.88))
    assert mean_gap_pp([longer], [shorter]) == pytest.approx(2.0)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "figure.png", [trace("ddp", events(0.5, 0.9))], 128, "two runs")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
