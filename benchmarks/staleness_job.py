"""Clicks by hashed features: a linear model whose weights are rows of a table, by workers that are slow now and then.

``STALENESS_STRATEGY`` names one of ``STRATEGIES``. A worker's step takes ``STEP_S`` asleep, and four times that in its
spells, which come by chance and make up 15 % of the time: each process draws its own.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import shoal
from shoal.job.job import Balance
from shoal.metrics import Metric

STEP_S = 0.02
SPELL_S, PART, SLOWED = 0.25, 0.15, 4.0
NUM_SAMPLES, NUM_FEATURES, NUM_IDS = 40_000, 12, 3_000
STEPS = int(os.environ.get("STALENESS_STEPS", "600"))
STRATEGIES: Mapping[str, Any] = {
    "sync": shoal.Sync(),
    "bounded_1": shoal.Bounded(1),
    "bounded_4": shoal.Bounded(4),
    "bounded_16": shoal.Bounded(16),
    "async": shoal.Async(),
}


class Spells:
    """When this process is slow: spells of a mean length, apart so that they are a part of the time."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._slow = False
        self._until_s = time.monotonic() + self._chance.expovariate(1 / self._mean_s())

    def _mean_s(self) -> float:
        return SPELL_S if self._slow else SPELL_S * (1 - PART) / PART

    def factor(self) -> float:
        """How many times as long a step takes now."""
        while time.monotonic() > self._until_s:
            self._slow = not self._slow
            self._until_s += self._chance.expovariate(1 / self._mean_s())
        return SLOWED if self._slow else 1.0


class Linear(nn.Module):
    """The sum of an example's features' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = shoal.EmbeddingBag("weights", 1, shoal.Adagrad(lr=0.1), mode="sum", initial_scale=0.0)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        return self.weights(features).squeeze(1) + self.bias


class Clicks:
    """Whether there was one."""

    def __init__(self) -> None:
        self._spells: Spells | None = None

    def model(self) -> nn.Module:
        return Linear()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self._spells is None:
            self._spells = Spells(os.getpid())
        loss = binary_cross_entropy_with_logits(model(batch[0]), batch[1])
        time.sleep(STEP_S * self._spells.factor())
        return loss

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        return {}


chance = np.random.default_rng(11)
features = chance.zipf(1.3, (NUM_SAMPLES, NUM_FEATURES)) % NUM_IDS
truth = chance.standard_normal(NUM_IDS) * 0.8
labels = (truth[features].sum(1) + chance.logistic(size=NUM_SAMPLES) > 0).astype(np.float32)

job = shoal.Job(
    task=Clicks(),
    train=shoal.Arrays(features, labels),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    strategy=shoal.ParameterServer(STRATEGIES[os.environ.get("STALENESS_STRATEGY", "sync")], round_steps=100),
    global_batch=256,
    steps=STEPS,
    log_every_steps=100,
    num_threads=1,
    num_lanes=16,
    storing=shoal.Storing(every_s=None),
    balance=Balance(enabled=False),
)
