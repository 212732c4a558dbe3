"""How much is asked of which bucket: what says that a shard runs hot, and what to move away from it."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from shoal.tables.batches import buckets_of
from shoal.tables.spec import NUM_BUCKETS

_ONE_IN = 8
_HALF_LIFE_S = 30.0
_NUM_HOTTEST = 5


class Loads:
    """Ids asked for by bucket, of one question in eight, forgotten by half every 30 s."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.float64] = np.zeros(NUM_BUCKETS)
        self._num_asked = 0
        self._at_s = time.monotonic()

    def note(self, ids: npt.NDArray[np.int64]) -> None:
        """These were asked for."""
        self._num_asked += 1
        if self._num_asked % _ONE_IN == 1:
            now_s = time.monotonic()
            self.counts *= 0.5 ** ((now_s - self._at_s) / _HALF_LIFE_S)
            self.counts += np.bincount(buckets_of(ids), minlength=NUM_BUCKETS)
            self._at_s = now_s

    def hottest(self) -> dict[str, float]:
        """The buckets that most is asked of, with their part of all that this shard is asked for."""
        total = self.counts.sum()
        if not total:
            return {}
        order = np.argsort(self.counts)[::-1][:_NUM_HOTTEST]
        return {str(bucket): round(float(self.counts[bucket] / total), 4) for bucket in order if self.counts[bucket]}
