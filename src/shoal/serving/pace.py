"""How long batches take, as measured: a part for each, and a part for each of their samples."""

from __future__ import annotations

import math

_REMEMBERED = 0.9
"""Of what is known, with each batch: what counts is about the last ten."""
_LEAST_SPREAD = 0.05
"""Of sizes, relative to their mean square, from which on the two parts can be told apart."""
_OWN_PART = 1 / 8
"""Of a batch's time: what it takes for itself, beyond its samples, is no reason for a larger one from here on."""
_LEAST_WORTH = 8
_MOST_ALIKE = 40
"""So many batches of about one size, and a larger one is tried: what is known may be old."""


def round_size(num: int) -> int:
    """The next size down of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40 and so on. Each size that a model computes has
    memory of its own, which is not given back: large ones should be few."""
    spare = max(0, num.bit_length() - 3)
    return num >> spare << spare


class Pace:
    """A line through (size, seconds), by least squares that forget. While all batches have one size it is a line
    through the origin: a batch of twice the size is thought to take twice as long."""

    def __init__(self) -> None:
        self._num = self._n = self._t = self._nn = self._nt = 0.0
        self.batch_s = self.sample_s = 0.0
        """Seconds for a batch of n samples: ``batch_s + n * sample_s``. Both 0 before the first."""
        self._worth = math.inf
        self._num_alike = 0

    def add(self, num_samples: int, took_s: float) -> None:
        """A batch was computed."""
        for name, value in (
            ("_num", 1.0), ("_n", num_samples), ("_t", took_s), ("_nn", num_samples**2), ("_nt", num_samples * took_s)
        ):  # fmt: skip
            setattr(self, name, _REMEMBERED * getattr(self, name) + value)
        n, t, nn, nt = self._n / self._num, self._t / self._num, self._nn / self._num, self._nt / self._num
        spread = nn - n * n
        is_told_apart = spread > _LEAST_SPREAD * nn
        slope = (nt - n * t) / spread if is_told_apart else t / n
        self.sample_s = min(max(0.0, slope), t / n)
        self.batch_s = t - self.sample_s * n
        self._num_alike = 0 if is_told_apart else self._num_alike + 1
        if is_told_apart:
            own = self.batch_s * (1 / _OWN_PART - 1)
            self._worth = max(_LEAST_WORTH, own / self.sample_s) if self.sample_s else math.inf

    def takes_s(self, num_samples: int) -> float:
        """How long a batch of this size will take."""
        return self.batch_s + num_samples * self.sample_s

    def worth(self, most: int) -> int:
        """The largest batch that gains from being no smaller, at most ``most``: beyond it there is as much done in a
        second, and each waits longer."""
        often = 2 if self._num_alike >= _MOST_ALIKE else 1
        return int(min(most, often * self._worth))

    def most_within(self, time_s: float, most: int) -> int:
        """The largest batch that takes no longer than this: from 1 to ``most``."""
        if self.sample_s * most + self.batch_s <= time_s:
            return most
        left_s = time_s - self.batch_s
        return max(1, min(most, int(left_s / self.sample_s + 1e-6))) if left_s > 0 and self.sample_s > 0 else 1
