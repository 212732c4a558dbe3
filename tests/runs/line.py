"""The smallest job: a line through points. Tests take it as it is, or as text to break."""

from __future__ import annotations

import torch
from torch import nn

import shoal
from shoal.metrics import RMSE

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
points = shoal.Arrays(x, x.sum(1, keepdim=True))


class Line:
    def model(self):
        return nn.Linear(4, 1)

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"rmse": RMSE.of(model(batch[0]), batch[1])}


job = shoal.Job(
    task=Line(),
    train=points,
    test=points,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    global_batch=8,
    epochs=2,
    num_threads=1,
)
