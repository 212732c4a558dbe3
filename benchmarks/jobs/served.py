"""A model of ``served_models`` as a job, for ``shoal serve``; ``SERVED`` names it. It is served, and not trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shoal
from benchmarks.served_models import DIM, KINDS, NUM_USERS, deep

RULE = shoal.SGD(lr=0.1)


class Clicks(nn.Module):
    """``served_models.Clicks`` with its rows in Shoal's tables."""

    def __init__(self) -> None:
        super().__init__()
        self.users = shoal.Embedding("users", DIM, RULE)
        self.films = shoal.EmbeddingBag("films", DIM, RULE, mode="mean")
        self.wide = shoal.EmbeddingBag("wide", 1, RULE, mode="sum")
        self.deep = deep()

    def forward(self, users: Tensor, films: Tensor, past: Tensor) -> Tensor:
        rows = torch.cat([self.users(users), self.films(films.unsqueeze(1)), self.films(past)], 1)
        found: Tensor = (self.deep(rows) + self.wide(torch.stack([users, films + NUM_USERS], 1))).squeeze(1)
        return found


class Served:
    """What requests carry, and what is answered."""

    def __init__(self, name: str) -> None:
        self._kind = KINDS[name]
        self._build = Clicks if name == "clicks" else self._kind.build

    def model(self) -> nn.Module:
        return self._build()

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec(name, datatype, (-1, *shape)) for name, (datatype, shape) in self._kind.inputs.items()]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._kind.answer(model, inputs)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError("it is served only")

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        return {}


job = shoal.Job(
    task=Served(os.environ.get("SERVED", "clothes")),
    train=shoal.Arrays(np.zeros((64, 1), np.float32)),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    global_batch=64,
    epochs=1,
    num_threads=1,
)
