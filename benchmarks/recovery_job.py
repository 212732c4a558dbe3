"""The peers' model and data as a job of Shoal's. ``RECOVERY_DATA`` names the folder that ``Workload`` wrote them to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import shoal
from benchmarks.workload import LEARNING_RATE, MOMENTUM, Workload
from shoal.metrics import Accuracy, Metric

work = Workload(num_steps=int(os.environ.get("RECOVERY_STEPS", "240")))
data = Path(os.environ["RECOVERY_DATA"])


class Recovering:
    """``benchmarks.workload`` as a task."""

    def model(self) -> nn.Module:
        return work.model()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return work.loss(model, *batch)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"accuracy": Accuracy.of(model(batch[0].unsqueeze(1) / 128 - 1), batch[1])}


job = shoal.Job(
    task=Recovering(),
    train=shoal.Arrays(data / "images.npy", data / "labels.npy"),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM),
    global_batch=work.global_batch,
    epochs=1,
    log_every_steps=1,
    num_threads=1,
    storing=shoal.Storing(every_steps=work.checkpoint_every_steps, every_s=None),
)
