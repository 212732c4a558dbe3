"""The order of an epoch's samples: which lane yields which rows of which blocks, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from shoal.errors import ConfigError
from shoal.lanes.hashing import Indices, key_of, permutation

_BLOCKS, _ROWS = 1, 2
_CACHED_BLOCKS = 256


@dataclass(frozen=True)
class Part:
    """Some rows of one block, in the order in which they are wanted."""

    block: int
    rows: Indices


@dataclass(frozen=True)
class Order:
    """A block-wise shuffle of an epoch, cut into lanes. It depends on nothing but these fields.

    The blocks are permuted and laid in a line, the rows of each permuted within it. A lane is a segment of that line;
    their sizes differ by one at most. So a lane touches few blocks, whoever hosts it reads about its own share, and
    every row is in exactly one lane, once.
    """

    block_sizes: tuple[int, ...]
    num_lanes: int
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        if self.num_lanes < 1:
            raise ConfigError(f"num_lanes must be at least 1, not {self.num_lanes}")
        if any(size < 0 for size in self.block_sizes):
            raise ConfigError("a block cannot have fewer than 0 rows")

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1]) if len(self.block_sizes) else 0

    def lane_size(self, lane: int) -> int:
        """How many samples the lane yields in this epoch."""
        return self._start(lane + 1) - self._start(lane)

    def slice(self, lane: int, start: int, stop: int) -> list[Part]:
        """The samples from ``start`` up to ``stop`` of a lane, in order. ``ConfigError`` beyond its end."""
        if not (0 <= lane < self.num_lanes and 0 <= start <= stop <= self.lane_size(lane)):
            raise ConfigError(f"lane {lane} of {self.num_lanes} yields no samples {start} to {stop}")
        first, last = self._start(lane) + start, self._start(lane) + stop
        parts = []
        position = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            block, end = int(self._blocks[position]), int(self._ends[position])
            begin = end - self.block_sizes[block]
            if end > first:
                parts.append(Part(block, self._rows(block)[first - begin : min(last, end) - begin]))
            first, position = max(first, min(last, end)), position + 1
        return parts

    def _start(self, lane: int) -> int:
        return lane * self.num_samples // self.num_lanes

    @cached_property
    def _blocks(self) -> Indices:
        return permutation(len(self.block_sizes), key_of(self.seed, self.epoch, _BLOCKS))

    @cached_property
    def _ends(self) -> Indices:
        return np.cumsum(np.asarray(self.block_sizes, np.int64)[self._blocks])

    def _rows(self, block: int) -> Indices:
        return _row_order(self.block_sizes[block], self.seed, self.epoch, block)


@lru_cache(maxsize=_CACHED_BLOCKS)
def _row_order(size: int, seed: int, epoch: int, block: int) -> Indices:
    return permutation(size, key_of(seed, epoch, _ROWS, block))
