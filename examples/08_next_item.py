"""What someone buys next: 22,363 shoppers' Beauty items in the order of time; the last of each is the test.

shoal train examples/08_next_item.py --workers 2

The mean of the rows of the last ten items meets the row of each item that may follow: against the others of the batch
and a thousand drawn at random in training, against all 12,101 in the test. The share of tests whose item is among the
ten highest, ``hit_rate``, is 0.0137 by popularity alone. ``NEXT_ITEM_DATA`` names the file: a shopper a line, the
number and then the items, as published with S3-Rec (RUCAIBox/CIKM2020-S3Rec, ``data/Beauty.txt``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from shoal.errors import ConfigError
from shoal.metrics import Metric, TopK

DATA = os.environ.get("NEXT_ITEM_DATA", "Beauty.txt")
DIM, PAST, DRAWN, BATCH = 64, 10, 1000, 512
NOTHING = 0
"""Where fewer than ten items came before."""


class Next(nn.Module):
    """The past as a mean of rows, and the items that may follow as rows of their own."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        rule = shoal.Adagrad(lr=0.1)
        self.past = shoal.EmbeddingBag("past", DIM, rule, mode="sum", initial_scale=0.05)
        self.items = shoal.Embedding("items", DIM, rule, initial_scale=0.05)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, past: Tensor, candidates: Tensor) -> Tensor:
        """(n, 10) ids and (m,) -> (n, m) scores."""
        known = (past != NOTHING).float()
        mean = self.past(past, per_sample_weights=known / known.sum(1, keepdim=True))
        found: Tensor = self.scale * mean @ self.items(candidates).T
        return found


class NextItem:
    """Which item follows."""

    def model(self) -> nn.Module:
        return Next(num_items)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        past, following = batch
        drawn = torch.randint(1, num_items + 1, (DRAWN,))
        candidates = torch.cat([following, drawn])
        scores = model(past, candidates)
        same = candidates[None] == following[:, None]
        same.fill_diagonal_(False)
        return cross_entropy(scores.masked_fill(same, -1e9), torch.arange(len(past)))

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        scores = model(batch[0], torch.arange(1, num_items + 1))
        return {"hit_rate": TopK.of(scores, batch[1] - 1, k=10)}


def examples(shoppers: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each item of each shopper but the first: (n, 10) items before it, and (n,) the item."""
    past, following = [], []
    for items in shoppers:
        for place in range(1, len(items)):
            before = items[max(0, place - PAST) : place]
            past.append([*before, *[NOTHING] * (PAST - len(before))])
            following.append(items[place])
    return np.array(past, np.int64), np.array(following, np.int64)


if not Path(DATA).exists():
    raise ConfigError(f"the file of shoppers is needed, and there is no {DATA}; name it with NEXT_ITEM_DATA")
shoppers = [[int(word) for word in line.split()[1:]] for line in Path(DATA).read_text().splitlines()]
num_items = max(max(items) for items in shoppers)
last = [examples([items[-PAST - 1 :]]) for items in shoppers]
test = tuple(np.stack([column[-1] for column in pair]) for pair in zip(*last, strict=True))

job = shoal.Job(
    task=NextItem(),
    train=shoal.Arrays(*examples([items[:-1] for items in shoppers])),
    test=shoal.Arrays(*test),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    strategy=shoal.Hybrid(shards=2),
    global_batch=BATCH,
    epochs=6,
    num_threads=1,
)
