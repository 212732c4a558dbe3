"""How often the label is the best guess, or among the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.metrics.checks import class_scores, predicted_classes
from shoal.metrics.metric import merge_parts, parts_to_state, require_samples


@dataclass(frozen=True)
class Accuracy:
    """The share of samples whose predicted class is the label."""

    correct: int
    count: int

    @classmethod
    def of(cls, outputs: Tensor, labels: Tensor) -> Self:
        """Labels (n,) against scores (n, classes), the lower class winning a tie, or predicted class numbers (n,)."""
        num_classes = None if outputs.ndim == 2 or outputs.dtype == torch.bool else torch.iinfo(torch.int64).max
        predicted, labels, _ = predicted_classes(outputs, labels, num_classes)
        return cls(int((predicted == labels).sum()), len(labels))

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "accuracy")
        return self.correct / self.count

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


@dataclass(frozen=True)
class TopK:
    """The share of samples whose label is among the ``k`` highest scores.

    Among equal scores the lower class comes first, so ``k=1`` is ``Accuracy``; scikit-learn puts the higher first.
    """

    correct: int
    count: int
    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, not {self.k}")

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor, k: int = 5) -> Self:
        """Scores (n, classes) and labels (n,) in 0..classes-1."""
        scores, labels = class_scores(scores, labels)
        mine = scores.gather(1, labels[:, None])
        before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
        rank = ((scores > mine) | ((scores == mine) & before)).sum(dim=1)
        return cls(int((rank < k).sum()), len(labels), k)

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        require_samples(self.count, "top-k accuracy")
        return self.correct / self.count

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)
