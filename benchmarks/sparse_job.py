"""Clicks of a made-up shop: eight features of a million ids, rows of 16, and a small dense net on top.

``SPARSE_STEPS``: steps; ``SPARSE_STRATEGY``: ``hybrid`` (the default) or ``sync``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import shoal
from shoal.job.job import Balance
from shoal.metrics import AUC, Metric

NUM_IDS, DIM, FEATURES, HIDDEN = 1_000_000, 16, 8, 64
NUM_TRAIN, NUM_TEST, GLOBAL_BATCH = 200_000, 20_000, 1024
STEPS = int(os.environ.get("SPARSE_STEPS", "200"))
LEARNING_RATE, INITIAL_SCALE = 0.05, 0.05
STRATEGIES: Mapping[str, Any] = {
    "hybrid": shoal.Hybrid(shards=2),
    "sync": shoal.ParameterServer(shoal.Sync(), shards=2, round_steps=20),
}


def dense_part() -> nn.Sequential:
    """What is not a table."""
    return nn.Sequential(nn.Linear(FEATURES * DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """As the table's rule."""
    return torch.optim.Adagrad(parameters, lr=LEARNING_RATE)


class Net(nn.Module):
    """Rows side by side, and two layers."""

    def __init__(self, rows: nn.Module | None = None) -> None:
        super().__init__()
        rule = shoal.Adagrad(lr=LEARNING_RATE)
        self.rows = rows or shoal.Embedding("rows", DIM, rule, initial_scale=INITIAL_SCALE)
        self.dense = dense_part()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.dense(self.rows(ids).flatten(1)).squeeze(1)
        return found


class Clicks:
    """Whether there was one."""

    def model(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"auc": AUC.of(model(batch[0]), batch[1].long())}


def clicks() -> tuple[np.ndarray, np.ndarray]:
    """Ids (n, 8) int64 and labels (n,) float32: some ids are much more frequent, and each has a weight."""
    random = np.random.default_rng(5)
    ids = (random.zipf(1.15, (NUM_TRAIN + NUM_TEST, FEATURES)) + np.arange(FEATURES) * 7919) % NUM_IDS
    weights = random.standard_normal(NUM_IDS).astype(np.float32)
    labels = weights[ids].sum(1) / 2 + random.logistic(size=len(ids)) > 0
    return ids.astype(np.int64), labels.astype(np.float32)


ids, labels = clicks()
job = shoal.Job(
    task=Clicks(),
    train=shoal.Arrays(ids[:NUM_TRAIN], labels[:NUM_TRAIN]),
    test=shoal.Arrays(ids[NUM_TRAIN:], labels[NUM_TRAIN:]),
    optimizer=optimizer_of,
    strategy=STRATEGIES[os.environ.get("SPARSE_STRATEGY", "hybrid")],
    global_batch=GLOBAL_BATCH,
    steps=STEPS,
    log_every_steps=10,
    num_threads=1,
    storing=shoal.Storing(every_s=None),
    balance=Balance(enabled=False),
)
