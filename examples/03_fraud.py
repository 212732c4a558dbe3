"""Rare fraud among payments: a table of numbers, 15 frauds in a thousand rows, groups of parameters.

shoal train examples/03_fraud.py --workers 2

The payments are drawn by a rule that this file states, so the best possible AUC is known, 0.96; this gets to 0.95.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import shoal
from shoal.metrics import AUC, AveragePrecision, LogLoss, Metric

COLUMNS = ("amount", "hour", "days_since_last", "distance", "is_abroad", "is_new_device")
DAY_HOURS = 24.0


def draw_payments(num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """``features`` (n, 6) float32, ``fraud`` (n,) float32, and ``chance`` (n,): what fraud was drawn from."""
    draw = np.random.default_rng(seed)
    amount, days, distance = (
        draw.lognormal(0, 1, num_rows),
        draw.exponential(3, num_rows),
        draw.exponential(1, num_rows),
    )
    hour = draw.uniform(0, DAY_HOURS, num_rows)
    abroad, new_device = draw.random(num_rows) < 0.1, draw.random(num_rows) < 0.15
    at_night = np.cos(2 * np.pi * (hour - 3) / DAY_HOURS)
    score = -9.5 + 2.0 * np.log1p(amount) + 1.5 * at_night + 1.0 * distance + 2.5 * abroad + 2.0 * new_device
    score += 2.0 * abroad * new_device - 0.2 * days
    chance = 1 / (1 + np.exp(-score))
    columns = (amount, hour / DAY_HOURS, days, distance, abroad, new_device)
    return {
        "features": np.stack(columns, axis=1).astype(np.float32),
        "fraud": (draw.random(num_rows) < chance).astype(np.float32),
        "chance": chance,
    }


class Fraud:
    """Batches are dicts of ``features`` (n, 6) and ``fraud`` (n,)."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(len(COLUMNS), 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(logits_of(model, batch["features"]), batch["fraud"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> Mapping[str, Metric]:
        logits, fraud = logits_of(model, batch["features"]), batch["fraud"].long()
        return {
            "auc": AUC.of(logits, fraud),
            "average_precision": AveragePrecision.of(logits, fraud),
            "log_loss": LogLoss.of(logits, fraud),
        }

    def parameter_groups(self, model: nn.Module) -> Sequence[dict[str, Any]]:
        """Weight decay for matrices only."""
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec("features", "FP32", (-1, len(COLUMNS)))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"chance": logits_of(model, inputs["features"]).sigmoid()}


def logits_of(model: nn.Module, features: Tensor) -> Tensor:
    """(n,) from (n, 6)."""
    scaled = torch.cat([features[:, :1].log1p(), features[:, 1:]], dim=1)
    logits: Tensor = model(scaled).squeeze(1)
    return logits


def source(num_rows: int, seed: int) -> shoal.Arrays:
    payments = draw_payments(num_rows, seed)
    return shoal.Arrays(features=payments["features"], fraud=payments["fraud"])


job = shoal.Job(
    task=Fraud(),
    train=source(50_000, seed=1),
    test=source(20_000, seed=2),
    optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
    global_batch=512,
    epochs=8,
    num_threads=1,
)
