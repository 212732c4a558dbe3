"""A job whose model counts how often each sample was committed: see ``num_commits``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import shoal
from shoal.metrics import Accuracy, Metric

NUM_SAMPLES = int(os.environ.get("COUNTING_SAMPLES", "4000"))
STEP_S = float(os.environ.get("COUNTING_STEP_S", "0.01"))
DTYPE = torch.float64 if os.environ.get("COUNTING_FLOAT64") else torch.float32


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(DTYPE)
        self.counts = nn.Parameter(torch.zeros(NUM_SAMPLES, dtype=torch.float64))


class Count:
    def model(self) -> nn.Module:
        return Counted()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, index = batch
        time.sleep(STEP_S)
        return nn.functional.cross_entropy(model.net(x.to(DTYPE)), y) + model.counts[index].mean()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"accuracy": Accuracy.of(model.net(batch[0].to(DTYPE)), batch[1])}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.net.parameters())}, {"params": [model.counts], "lr": 1.0, "momentum": 0.0}]


def num_commits(model: nn.Module) -> Tensor:
    """How often each sample was committed: at a rate of 1, each time takes 1/n from its count."""
    return (-model.counts.detach() * GLOBAL_BATCH).round(decimals=6)


GLOBAL_BATCH = 40
generator = torch.Generator().manual_seed(7)
x = torch.randn(NUM_SAMPLES, 16, generator=generator)
y = (x[:, :4] + 0.1 * torch.randn(NUM_SAMPLES, 4, generator=generator)).argmax(1)

job = shoal.Job(
    task=Count(),
    train=shoal.Arrays(x.numpy(), y.numpy(), torch.arange(NUM_SAMPLES).numpy(), block_rows=50),
    test=shoal.Arrays(x.numpy()[:500], y.numpy()[:500], torch.arange(500).numpy()),
    optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    global_batch=GLOBAL_BATCH,
    epochs=1,
    log_every_steps=1,
    num_threads=1,
    fingerprint_every_steps=10,
    storing=shoal.Storing(every_steps=25, every_s=None),
)
