"""Means over samples or elements: of anything, of log losses, of errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.metrics.checks import class_numbers, class_scores, real_array, same_shape
from shoal.metrics.exact import ExactSum
from shoal.metrics.metric import merge_parts, parts_to_state, require_samples


@dataclass(frozen=True)
class Mean:
    """The mean of numbers, correctly rounded once."""

    total: ExactSum
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Of all elements, any shape, which must be finite: one number a sample, not a batch's mean."""
        array = real_array("values", values)
        return cls(ExactSum.of(array), array.size)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "a mean")
        return self.total.over(self.count)

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


@dataclass(frozen=True)
class LogLoss:
    """Mean negative log likelihood of the labels, in nats, from logits; computed in float64, nothing clipped."""

    total: ExactSum
    count: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Self:
        """Logits (n, classes) and labels (n,) in 0..classes-1; or logits (n,) of class 1 and labels 0 and 1."""
        losses = _binary_losses(logits, labels) if logits.ndim == 1 else _class_losses(logits, labels)
        return cls(ExactSum.of(losses), losses.size)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "log loss")
        return self.total.over(self.count)

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


def _class_losses(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    logits, labels = class_scores(logits, labels)
    likelihoods = torch.log_softmax(logits.double(), dim=1)
    return real_array("losses", -likelihoods.gather(1, labels[:, None]))


def _binary_losses(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    scores = real_array("logits", logits)
    positive = class_numbers("labels", labels, len(scores), 2).cpu().numpy() == 1
    losses: NDArray[np.float64] = np.logaddexp(0.0, np.where(positive, -scores, scores))
    return losses


@dataclass(frozen=True)
class RMSE:
    """Root of the mean squared error over all elements; errors are squared in float64."""

    total: ExactSum
    count: int

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor) -> Self:
        """Both of one shape, any; nothing is broadcast."""
        one, other = same_shape(predictions, targets)
        with np.errstate(over="ignore"):
            return cls(ExactSum.of(np.square(one - other)), one.size)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "RMSE")
        return math.sqrt(self.total.over(self.count))

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


@dataclass(frozen=True)
class MAE:
    """Mean absolute error over all elements, in float64."""

    total: ExactSum
    count: int

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor) -> Self:
        """Both of one shape, any; nothing is broadcast."""
        one, other = same_shape(predictions, targets)
        return cls(ExactSum.of(np.abs(one - other)), one.size)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "MAE")
        return self.total.over(self.count)

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)
