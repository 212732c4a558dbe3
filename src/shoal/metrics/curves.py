"""Areas under curves over all thresholds: exact, from the counts at every distinct score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoal.metrics.arrays import Counts, pack_counts, pack_floats, unpack
from shoal.metrics.checks import class_numbers, real_array
from shoal.metrics.metric import merge_parts, parts_to_state, require_samples


@dataclass(frozen=True)
class Run:
    """Distinct scores in rising order, and how many negatives and positives had each. All of shape (scores,)."""

    scores: NDArray[np.float64]
    negatives: Counts
    positives: Counts


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """How many negatives and positives had each score, in sorted runs that at least halve in length.

    So folding n scores in, batch by batch, costs O(n log n) and not O(n) a batch. Memory: at most 48 bytes a score.
    """

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> Self:
        """Finite scores (n,) and labels (n,), 0 or 1. Scores compare as float64, into which all float types fit."""
        # Adding 0 makes a negative zero positive: they compare equal, and so must their bits.
        array = real_array("scores", scores) + 0.0
        positive = class_numbers("labels", labels, scores.numel(), 2).cpu().numpy()
        return cls((_distinct(array.reshape(-1), 1 - positive, positive),) if array.size else ())

    def __add__(self, other: ScoreCounts) -> Self:
        return type(self)(_stack(sorted(self.runs + other.runs, key=lambda run: -len(run.scores))))

    def whole(self) -> Run:
        """All counts in one run."""
        if len(self.runs) == 1:
            return self.runs[0]
        nothing = np.zeros(0, np.int64)
        return _join(*self.runs) if self.runs else Run(nothing.astype(np.float64), nothing, nothing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreCounts) and self.to_state() == other.to_state()

    def __hash__(self) -> int:
        return hash(self.whole().scores.tobytes())

    def to_state(self) -> dict[str, Any]:
        run = self.whole()
        return {
            "scores": pack_floats(run.scores),
            "negatives": pack_counts(run.negatives),
            "positives": pack_counts(run.positives),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        scores = unpack(state["scores"]).astype(np.float64)
        negatives, positives = (unpack(state[side]).astype(np.int64) for side in ("negatives", "positives"))
        if not len(scores) == len(negatives) == len(positives) or not (np.diff(scores) > 0).all():
            raise ValueError("scores must be distinct and rising, with as many counts")
        return cls((Run(scores, negatives, positives),) if len(scores) else ())


def _stack(runs: list[Run]) -> tuple[Run, ...]:
    """Join runs, given from long to short, until each is at most half as long as the one before."""
    stack: list[Run] = []
    for run in runs:
        while stack and 2 * len(run.scores) > len(stack[-1].scores):
            run = _join(stack.pop(), run)
        stack.append(run)
    return tuple(stack)


def _join(*runs: Run) -> Run:
    return _distinct(
        np.concatenate([run.scores for run in runs]),
        np.concatenate([run.negatives for run in runs]),
        np.concatenate([run.positives for run in runs]),
    )


def _distinct(scores: NDArray[np.float64], negatives: Counts, positives: Counts) -> Run:
    order = np.argsort(scores, kind="stable")
    distinct, starts = np.unique(scores[order], return_index=True)
    return Run(distinct, np.add.reduceat(negatives[order], starts), np.add.reduceat(positives[order], starts))


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve: how probably a positive outscores a negative, a tie counting one half.

    Exact (Mann-Whitney's U in whole numbers) up to 2**31 samples of each label. Holds at most 24 bytes a distinct score
    once merged. NaN where one label is missing, for there the curve does not exist; scikit-learn's value.
    """

    counts: ScoreCounts

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> Self:
        """Scores (n,), higher for the positive, logits or probabilities alike; labels (n,), 0 or 1."""
        return cls(ScoreCounts.of(scores, labels))

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        run = self.counts.whole()
        require_samples(len(run.scores), "AUC")
        num_negatives, num_positives = int(run.negatives.sum()), int(run.positives.sum())
        if not num_negatives or not num_positives:
            return math.nan
        below = np.cumsum(run.negatives) - run.negatives
        doubled = int((run.positives * (2 * below + run.negatives)).sum())
        return doubled / (2 * num_positives * num_negatives)

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)


@dataclass(frozen=True)
class AveragePrecision:
    """Precision at each distinct score as the threshold, weighted by the recall that it adds; nothing interpolated.

    0 where no sample is positive, as in scikit-learn. Holds as much as ``AUC``.
    """

    counts: ScoreCounts

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> Self:
        """Scores (n,), higher for the positive, logits or probabilities alike; labels (n,), 0 or 1."""
        return cls(ScoreCounts.of(scores, labels))

    def merge(self, other: Self) -> Self:
        return merge_parts(self, other)

    def value(self) -> float:
        run = self.counts.whole()
        require_samples(len(run.scores), "average precision")
        added = run.positives[::-1]
        found, taken = np.cumsum(added), np.cumsum(added + run.negatives[::-1])
        return math.fsum(added * (found / taken)) / max(int(run.positives.sum()), 1)

    def to_state(self) -> dict[str, Any]:
        return parts_to_state(self)
