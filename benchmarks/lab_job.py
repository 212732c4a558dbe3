"""A job for runs on the hosts of a lab: what a step costs is set by the environment, and its model counts for itself.

``LAB_JOB_STRATEGY``: one of ``STRATEGIES``. ``LAB_JOB_BATCH``: samples a step. ``LAB_JOB_SAMPLE_S`` and
``LAB_JOB_STEP_S``: how long each sample, and each step, takes asleep, so that workers do not compete for processors.
``LAB_JOB_ROWS``: how many rows a sample counts for, which is what it costs to compute. ``LAB_JOB_WIDTH``: of the
network, whose square is what a step has to send.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shoal
from shoal.metrics import Metric

ROUND_STEPS = 8
STRATEGIES: Mapping[str, Any] = {
    "allreduce": shoal.AllReduce(),
    "allreduce_int8": shoal.AllReduce(codec=shoal.Int8(), uncompressed=("counts",)),
    "local_sgd": shoal.LocalSGD(sync_every_steps=ROUND_STEPS),
    "diloco": shoal.DiLoCo(sync_every_steps=ROUND_STEPS, fragments=4, overlap_steps=ROUND_STEPS // 2),
}
NUM_SAMPLES, NUM_INPUTS, NUM_CLASSES = 4096, 32, 4

strategy = os.environ.get("LAB_JOB_STRATEGY", "allreduce")
global_batch = int(os.environ.get("LAB_JOB_BATCH", "64"))
sample_s = float(os.environ.get("LAB_JOB_SAMPLE_S", "0"))
step_s = float(os.environ.get("LAB_JOB_STEP_S", "0"))
rows = int(os.environ.get("LAB_JOB_ROWS", "1"))
width = int(os.environ.get("LAB_JOB_WIDTH", "64"))


class Counted(nn.Module):
    """A network, and one number a sample, from which each time that the sample is committed takes 1/batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(NUM_INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES)
        )
        self.counts = nn.Parameter(torch.zeros(NUM_SAMPLES, dtype=torch.float64))


class Classify:
    """Which of the first inputs is the largest."""

    def model(self) -> nn.Module:
        return Counted()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, index = batch
        time.sleep(step_s + sample_s * len(x))
        found: Tensor = model.net(x.repeat_interleave(rows, 0))  # type: ignore[operator]
        return nn.functional.cross_entropy(found, y.repeat_interleave(rows)) + model.counts[index].mean()  # type: ignore[index]

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Metric]:
        return {}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Only where every step is an exact sum over all samples can the model count."""
        counting = 1.0 if strategy.startswith("allreduce") else 0.0
        return [{"params": list(model.net.parameters())}, {"params": [model.counts], "lr": counting}]  # type: ignore[union-attr]


x = np.random.default_rng(7).standard_normal((NUM_SAMPLES, NUM_INPUTS), dtype=np.float32)

job = shoal.Job(
    task=Classify(),
    train=shoal.Arrays(x, x[:, :NUM_CLASSES].argmax(1), np.arange(NUM_SAMPLES)),
    optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
    strategy=STRATEGIES[strategy],
    global_batch=global_batch,
    steps=1_000_000,
    log_every_steps=1,
    num_threads=1,
    storing=shoal.Storing(every_steps=None, every_s=None),
)
