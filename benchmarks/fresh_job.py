"""The clicks of ``sparse_job``, for a run that goes on until it is stopped, stores a version every second, and is
served. Its clicks come at a rate, as they do live: about 16,000 a second, each with eight ids."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import shoal
from benchmarks import sparse_job

STEPS, KEPT, STEP_S = 100_000, 20, 0.05


class Clicks(sparse_job.Clicks):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        time.sleep(STEP_S)
        return super().loss(model, batch)

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec("ids", "INT64", (-1, sparse_job.FEATURES))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"click": torch.sigmoid(model(inputs["ids"]))}


job = dataclasses.replace(
    sparse_job.job,
    task=Clicks(),
    steps=STEPS,
    strategy=shoal.Hybrid(shards=2),
    storing=shoal.Storing(every_s=1.0, keep_last=KEPT),
)
