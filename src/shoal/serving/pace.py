"""How long batches take, as measured: a part for each, and a part for each of their samples."""

from __future__ import annotations

_REMEMBERED = 0.9
"""Of what is known, with each batch: what counts is about the last ten."""
_LEAST_SPREAD = 0.05
"""Of sizes, relative to their mean square, from which on the two parts can be told apart."""


class Pace:
    """A line through (size, seconds), by least squares that forget. While all batches have one size it is a line
    through the origin: a batch of twice the size is thought to take twice as long."""

    def __init__(self) -> None:
        self._num = self._n = self._t = self._nn = self._nt = 0.0
        self.batch_s = self.sample_s = 0.0
        """Seconds for a batch of n samples: ``batch_s + n * sample_s``. Both 0 before the first."""

    def add(self, num_samples: int, took_s: float) -> None:
        """A batch was computed."""
        for name, value in (
            ("_num", 1.0), ("_n", num_samples), ("_t", took_s), ("_nn", num_samples**2), ("_nt", num_samples * took_s)
        ):  # fmt: skip
            setattr(self, name, _REMEMBERED * getattr(self, name) + value)
        n, t, nn, nt = self._n / self._num, self._t / self._num, self._nn / self._num, self._nt / self._num
        spread = nn - n * n
        slope = (nt - n * t) / spread if spread > _LEAST_SPREAD * nn else t / n
        self.sample_s = min(max(0.0, slope), t / n)
        self.batch_s = t - self.sample_s * n

    def takes_s(self, num_samples: int) -> float:
        """How long a batch of this size will take."""
        return self.batch_s + num_samples * self.sample_s

    def most_within(self, time_s: float, most: int) -> int:
        """The largest batch that takes no longer than this: from 1 to ``most``."""
        if self.sample_s * most + self.batch_s <= time_s:
            return most
        left_s = time_s - self.batch_s
        return max(1, min(most, int(left_s / self.sample_s + 1e-6))) if left_s > 0 and self.sample_s > 0 else 1
