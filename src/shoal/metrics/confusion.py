"""Which classes are taken for which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError
from shoal.metrics.arrays import Counts, Tally
from shoal.metrics.checks import predicted_classes
from shoal.metrics.metric import merge_parts, parts_to_state, require_samples


@dataclass(frozen=True)
class Confusion:
    """How many samples of each class were taken for each class. Holds classes x classes counts."""

    counts: Tally

    @classmethod
    def of(cls, outputs: Tensor, labels: Tensor, num_classes: int | None = None) -> Self:
        """Labels (n,) against scores (n, classes), the lower class winning a tie; or against predicted class numbers
        (n,), with ``num_classes``; or against booleans (n,)."""
        predicted, labels, num_classes = predicted_classes(outputs, labels, num_classes)
        cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        return cls(Tally(cells.reshape(num_classes, num_classes).cpu().numpy()))

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> dict[str, Any]:
        """``{"matrix": rows}``: row i, column j counts the samples of class i that were taken for class j."""
        require_samples(int(self.counts.counts.sum()), "a confusion matrix")
        return {"matrix": self.counts.counts.tolist()}

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


Average = Literal["binary", "micro", "macro"]
_AVERAGES = ("binary", "micro", "macro")


@dataclass(frozen=True)
class F1:
    """The harmonic mean of precision and recall, 2 tp / (2 tp + fp + fn).

    ``binary``: of class 1 among two. ``macro``: the plain mean over the classes that occur, in labels or predictions.
    ``micro``: from the counts of all classes together, which is the accuracy where a sample has one class. 0 where
    neither labels nor predictions hold the class, as in scikit-learn.
    """

    hits: Tally
    predicted: Tally
    actual: Tally
    average: Average = "macro"

    def __post_init__(self) -> None:
        if self.average not in _AVERAGES:
            raise ConfigError(f"average must be one of {', '.join(_AVERAGES)}, not {self.average!r}")
        if self.average == "binary" and self.hits.counts.shape != (2,):
            raise ConfigError(f"average='binary' needs two classes, and there are {self.hits.counts.size}")

    @classmethod
    def of(cls, outputs: Tensor, labels: Tensor, average: Average = "macro", num_classes: int | None = None) -> Self:
        """Outputs and labels as for ``Confusion``."""
        predicted, labels, num_classes = predicted_classes(outputs, labels, num_classes)
        hits = _tally(labels[predicted == labels], num_classes)
        return cls(hits, _tally(predicted, num_classes), _tally(labels, num_classes), average)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        hits, predicted, actual = self.hits.counts, self.predicted.counts, self.actual.counts
        require_samples(int(actual.sum()), "F1")
        if self.average == "binary":
            return float(_f1(hits, predicted, actual)[1])
        if self.average == "micro":
            return float(_f1(hits.sum(), predicted.sum(), actual.sum()))
        return float(_f1(hits, predicted, actual)[predicted + actual > 0].mean())

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


def _tally(classes: Tensor, num_classes: int) -> Tally:
    return Tally(torch.bincount(classes, minlength=num_classes).cpu().numpy())


def _f1(hits: Counts, predicted: Counts, actual: Counts) -> NDArray[np.float64]:
    # tp + fp is what was predicted, tp + fn is what is there.
    return np.asarray(2.0 * hits / np.maximum(predicted + actual, 1))
