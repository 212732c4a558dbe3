"""Jobs that tell points apart, each with one thing that could make many workers differ from a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from shoal.metrics import Accuracy, Metric

NUM_SAMPLES = 990
NUM_FEATURES = 8


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Linear(16, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))


def wide_enough_for_threads() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 4096), nn.Tanh(), nn.Linear(4096, 3))


class Experts(nn.Module):
    """One layer for all samples, one that few samples use, one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(NUM_FEATURES, 3)
        self.few = nn.Linear(NUM_FEATURES, 3)
        self.none = nn.Linear(NUM_FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        rare = (x[:, :1] > 1.5).flatten()
        scores = self.all(x)
        return scores.index_add(0, rare.nonzero().flatten(), self.few(x[rare])) if rare.any() else scores


@dataclass(frozen=True)
class Classify:
    """Three classes of points. A step takes ``step_s`` at least, so that a test can meet it."""

    body: Callable[[], nn.Module] = plain
    dtype: torch.dtype = torch.float32
    step_s: float = 0.0

    def model(self) -> nn.Module:
        return self.body().to(self.dtype)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        time.sleep(self.step_s)
        return cross_entropy(model(x.to(self.dtype)), y)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        x, y = batch
        return {"accuracy": Accuracy.of(model(x.to(self.dtype)), y)}


class ClassifyInGroups(Classify):
    """Biases learn faster, and do not decay."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim == 1]
        return [{"params": weights}, {"params": biases, "lr": 0.3, "weight_decay": 0.0}]


def points() -> shoal.Arrays:
    return points_but(None, 0.0)


def points_but(sample: int | None, value: float) -> shoal.Arrays:
    """The points, one of which has ``value`` for a feature."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_SAMPLES, NUM_FEATURES, generator=generator)
    y = (x[:, :3] + 0.2 * torch.randn(NUM_SAMPLES, 3, generator=generator)).argmax(1)
    if sample is not None:
        x[sample, 0] = value
    return shoal.Arrays(x, y, block_rows=40)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def warming(step: int) -> float:
    return min(1.0, (step + 1) / 20)


def make_job(task: Classify | None = None, **changes: Any) -> shoal.Job:
    """A job of 200 steps and four epochs and a bit, which end with short batches; logged at every step."""
    fields: dict[str, Any] = {
        "task": task or Classify(),
        "train": points(),
        "optimizer": sgd,
        "global_batch": 25,
        "steps": 200,
        "log_every_steps": 1,
        "num_threads": 1,
        "patience": shoal.Patience(silent_s=20.0),
    }
    return shoal.Job(**{**fields, **changes})
