from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.lanes import Order, Steps

plans = st.builds(Steps, st.integers(1, 60), st.integers(1, 20), st.integers(1, 12), epochs=st.integers(1, 3))


def turns(steps: Steps) -> list[int]:
    """The slow obvious twin: whose turn it is, one sample after another."""
    left = [Order((steps.num_samples,), steps.num_lanes, 0, 0).lane_size(lane) for lane in range(steps.num_lanes)]
    width = max(1, (steps.num_lanes - 1).bit_length())
    places = [int(f"{place:0{width}b}"[::-1], 2) for place in range(2**width)]
    found: list[int] = []
    while len(found) < steps.num_samples:
        for lane in places:
            if lane < steps.num_lanes and left[lane]:
                left[lane] -= 1
                found.append(lane)
    return found


@given(plans)
def test_steps_take_what_one_turn_after_another_would(steps: Steps) -> None:
    order = turns(steps)
    for step in range(steps.total_steps):
        epoch, within = steps.locate(step)
        taken = order[within * steps.global_batch : (within + 1) * steps.global_batch]
        span = steps.span(step)
        assert span.epoch == epoch
        assert span.num_samples == len(taken)
        assert (span.stops - span.starts).tolist() == [taken.count(lane) for lane in range(steps.num_lanes)]


@given(plans)
def test_an_epochs_spans_partition_its_lanes(steps: Steps) -> None:
    sizes = [Order((steps.num_samples,), steps.num_lanes, 0, 0).lane_size(lane) for lane in range(steps.num_lanes)]
    cursors = np.zeros(steps.num_lanes, np.int64)
    for step in range(steps.total_steps):
        span = steps.span(step)
        assert span.starts.tolist() == cursors.tolist() == steps.cursors(step).tolist()
        cursors = span.stops
        if (step + 1) % steps.steps_per_epoch == 0:
            assert cursors.tolist() == sizes
            cursors = np.zeros(steps.num_lanes, np.int64)


def test_a_short_epoch_ends_with_a_short_batch() -> None:
    steps = Steps(num_samples=10, global_batch=4, num_lanes=3, epochs=2)
    assert [steps.span(step).num_samples for step in range(steps.total_steps)] == [4, 4, 2, 4, 4, 2]


def test_a_batch_smaller_than_the_lanes_is_spread_over_them() -> None:
    span = Steps(num_samples=640, global_batch=4, num_lanes=64, epochs=1).span(0)
    assert np.flatnonzero(span.stops - span.starts).tolist() == [0, 16, 32, 48]


def test_total_steps_may_end_within_an_epoch() -> None:
    steps = Steps(num_samples=10, global_batch=4, num_lanes=3, total_steps=5)
    assert steps.total_steps == 5
    assert steps.locate(4) == (1, 1)


@given(plans, st.integers(1, 6))
def test_workers_together_take_a_step_however_many_they_are(steps: Steps, num_workers: int) -> None:
    span = steps.span(steps.total_steps - 1)
    counts = span.stops - span.starts
    shares = [counts[lanes].sum() for lanes in np.array_split(np.arange(steps.num_lanes), num_workers)]
    assert sum(shares) == span.num_samples


@pytest.mark.parametrize(
    "changed",
    [
        {"num_samples": 0},
        {"global_batch": 0},
        {"num_lanes": 0},
        {"epochs": None},
        {"total_steps": 3},
        {"epochs": 0},
        {"epochs": None, "total_steps": -1},
    ],
)
def test_a_plan_that_cannot_be_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"at least|either epochs or total_steps"):
        Steps(**{"num_samples": 10, "global_batch": 4, "num_lanes": 3, "epochs": 1, **changed})
