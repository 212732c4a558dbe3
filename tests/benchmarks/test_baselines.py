from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ddp import Baseline, Recipe

RECIPE = "tests.benchmarks.test_baselines:recipe"


def recipe() -> Recipe:
    return Recipe(
        model=lambda: nn.Linear(4, 1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=lambda model, batch: model(batch).square().mean(),
        batches=_ones,
    )


def broken() -> Recipe:
    raise ValueError("no such recipe")


def _ones(rank: int, world_size: int) -> Iterator[Tensor]:
    while True:
        yield torch.ones(2 + rank, 4)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_baseline_runs_the_steps_it_is_told_and_then_more(num_workers: int) -> None:
    with Baseline(RECIPE, num_workers=num_workers) as baseline:
        first, second = baseline.run(3), baseline.run(5)
    assert len(first.step_s) == 3
    assert len(second.step_s) == 5
    assert min(first.step_s + second.step_s) > 0
    assert len(second.peak_rss_bytes) == num_workers
    assert min(second.peak_rss_bytes) > 50e6


def test_two_baselines_take_turns() -> None:
    with Baseline(RECIPE, num_workers=2) as ddp, Baseline(RECIPE, num_workers=1) as plain:
        turns = [len(each.run(2).step_s) for _ in range(2) for each in (ddp, plain)]
    assert turns == [2, 2, 2, 2]


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with (
        Baseline("tests.benchmarks.test_baselines:broken", num_workers=1) as baseline,
        pytest.raises(RuntimeError, match="baseline worker 0 was needed, but it has ended"),
    ):
        baseline.run(1)
