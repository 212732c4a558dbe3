"""A job with tables whose gradients are sums without rounding: whoever computes what, and however often it is begun,
the tables of a version have the same bits. And one table counts how often each sample was committed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shoal
from shoal.metrics import Mean, Metric

NUM_SAMPLES = int(os.environ.get("TABLED_SAMPLES", "4096"))
STEP_S = float(os.environ.get("TABLED_STEP_S", "0.01"))
GLOBAL_BATCH = 32


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.users = shoal.Embedding("users", 4, shoal.Adagrad(lr=0.1))
        self.tags = shoal.EmbeddingBag("tags", 4, shoal.Adam(lr=0.01), mode="sum", admit_after=2)
        self.counts = shoal.Embedding("counts", 1, shoal.SGD(lr=1.0), initial_scale=0.0)


class Linear:
    """The loss is linear in all that is trained, with small integers over a power of two: gradients are exact."""

    def model(self) -> nn.Module:
        return Tabled()

    def loss(self, model: Any, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        users, tags, targets, index = batch
        time.sleep(STEP_S)
        of_users = (model.users(users) * targets).sum(1)
        of_tags = (model.tags(tags) * targets).sum(1)
        loss: Tensor = (of_users + of_tags + model.bias + model.counts(index).squeeze(1)).mean()
        return loss

    def metrics(self, model: Any, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"mean": Mean.of(model.users(batch[0]).sum(1))}


random = np.random.default_rng(3)
users = random.integers(-(2**63), 2**63 - 1, 200)[random.integers(0, 200, NUM_SAMPLES)]
tags = random.zipf(1.5, (NUM_SAMPLES, 3)) % 1000
targets = random.integers(-3, 4, (NUM_SAMPLES, 4)).astype(np.float32)
index = np.arange(NUM_SAMPLES)

job = shoal.Job(
    task=Linear(),
    train=shoal.Arrays(users, tags, targets, index, block_rows=64),
    test=shoal.Arrays(users[:200], tags[:200], targets[:200], index[:200]),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    strategy=shoal.Hybrid(shards=2),
    global_batch=GLOBAL_BATCH,
    epochs=1,
    num_lanes=16,
    log_every_steps=1,
    num_threads=1,
    fingerprint_every_steps=10,
    storing=shoal.Storing(every_steps=25, every_s=None),
)
