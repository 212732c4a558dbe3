"""A job with tables that is served: films that users rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shoal
from shoal.metrics import RMSE, Metric


class Rated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users = shoal.Embedding("users", 4, shoal.Adagrad(lr=0.1))
        self.tags = shoal.EmbeddingBag("tags", 4, shoal.FTRL(alpha=0.1), mode="mean")
        self.top = nn.Linear(8, 1)


class Rating:
    def model(self) -> nn.Module:
        return Rated()

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.predict(model, batch)["rating"] - batch["rating"]).square().mean()

    def metrics(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Metric]:
        return {"rmse": RMSE.of(self.predict(model, batch)["rating"], batch["rating"])}

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec("user", "INT64", (-1,)), shoal.TensorSpec("tags", "INT64", (-1, 3))]

    def predict(self, model: Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        both = torch.cat([model.users(inputs["user"]), model.tags(inputs["tags"])], 1)
        return {"rating": model.top(both).squeeze(1)}


random = np.random.default_rng(5)
users = random.integers(-(2**63), 2**63 - 1, 50)[random.integers(0, 50, 1000)]
tags = random.integers(0, 300, (1000, 3))
ratings = (users % 5 + tags.mean(1) / 300).astype(np.float32)

job = shoal.Job(
    task=Rating(),
    train=shoal.Arrays(user=users, tags=tags, rating=ratings, block_rows=64),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    strategy=shoal.Hybrid(shards=2),
    global_batch=50,
    epochs=2,
    num_lanes=4,
    num_threads=1,
)
