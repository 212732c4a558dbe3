"""The order of an epoch's samples: which lane yields which rows of which blocks, in which order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from shoal.errors import ConfigError
from shoal.lanes.hashing import Indices, key_of, permutation

_BLOCKS, _ROWS = 1, 2


class Part(NamedTuple):
    """Some rows of one block, in the order in which they are wanted."""

    block: int
    rows: Indices


class _Piece(NamedTuple):
    """The samples of a lane, from ``start`` up to ``stop``, that are of one block."""

    start: int
    stop: int
    block: int
    rows: Indices


def lane_bounds(num_samples: int, num_lanes: int) -> tuple[int, ...]:
    """(num_lanes + 1,): where each lane begins on the line of an epoch's samples, and where the line ends."""
    return tuple(lane * num_samples // num_lanes for lane in range(num_lanes + 1))


@dataclass(frozen=True)
class Order:
    """A block-wise shuffle of an epoch, cut into lanes. It depends on nothing but these fields.

    The blocks are permuted and laid in a line, the rows of each permuted within it. A lane is a segment of that line;
    their sizes differ by one at most. So a lane is in one block at a time, whoever hosts it reads about its own share,
    and every row is in exactly one lane, once. Odd lanes run from the end of their segment to its beginning: lanes that
    share a block are in it at the same time, and it need not be read twice.
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

    @cached_property
    def num_samples(self) -> int:
        return sum(self.block_sizes)

    def lane_size(self, lane: int) -> int:
        """How many samples the lane yields in this epoch."""
        return self._bounds[lane + 1] - self._bounds[lane]

    def slice(self, lane: int, start: int, stop: int) -> list[Part]:
        """The samples from ``start`` up to ``stop`` of a lane, in order. ``ConfigError`` beyond its end.

        A microsecond or two; the first slice in a block also permutes the block's rows, about 0.5 s a million.
        """
        self._check(lane, start, stop)
        parts = []
        while start < stop:
            piece = self._pieces.get(lane)
            if piece is None or not piece.start <= start < piece.stop:
                piece = self._pieces[lane] = self._piece(lane, start)
            upto = min(piece.stop, stop)
            parts.append(Part(piece.block, piece.rows[start - piece.start : upto - piece.start]))
            start = upto
        return parts

    def blocks_of(self, lanes: Indices, starts: Indices, stops: Indices) -> list[list[int]]:
        """For each of these lanes the blocks that hold its samples from ``starts`` up to ``stops``, in its order.

        Permutes no rows. The bounds are not checked.
        """
        bounds, ends = np.asarray(self._bounds), self._ends_array
        is_odd = lanes % 2 == 1
        first = np.where(is_odd, bounds[lanes + 1] - stops, bounds[lanes] + starts)
        begins = np.searchsorted(ends, first, side="right")
        after = np.searchsorted(ends, first + stops - starts, side="left") + (stops > starts)
        found = zip(is_odd.tolist(), begins.tolist(), after.tolist(), strict=True)
        return [self._blocks[begin:end][:: -1 if odd else 1] for odd, begin, end in found]

    def _check(self, lane: int, start: int, stop: int) -> None:
        if not (0 <= lane < self.num_lanes and 0 <= start <= stop <= self.lane_size(lane)):
            raise ConfigError(f"lane {lane} of {self.num_lanes} yields no samples {start} to {stop}")

    def _piece(self, lane: int, start: int) -> _Piece:
        """The piece of a lane that its sample at ``start`` is in."""
        low, high = self._bounds[lane], self._bounds[lane + 1]
        on_line = high - 1 - start if lane % 2 else low + start
        position = bisect_right(self._ends, on_line)
        block, end = self._blocks[position], self._ends[position]
        begin = end - self.block_sizes[block]
        first, last = max(low, begin), min(high, end)
        rows = self._rows(block)[first - begin : last - begin]
        if lane % 2:
            return _Piece(high - last, high - first, block, rows[::-1].copy())
        return _Piece(first - low, last - low, block, rows)

    @cached_property
    def _pieces(self) -> dict[int, _Piece]:
        """The piece that each lane was last in: most slices begin where the one before ended."""
        return {}

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        return lane_bounds(self.num_samples, self.num_lanes)

    @cached_property
    def _blocks(self) -> list[int]:
        """The line: blocks that have rows, in the epoch's order."""
        order = permutation(len(self.block_sizes), key_of(self.seed, self.epoch, _BLOCKS)).tolist()
        return [block for block in order if self.block_sizes[block]]

    @cached_property
    def _ends(self) -> list[int]:
        """Where each block of the line ends on it."""
        return list(accumulate(self.block_sizes[block] for block in self._blocks))

    @cached_property
    def _ends_array(self) -> Indices:
        return np.asarray(self._ends, np.int64)

    @cached_property
    def _rows(self) -> Callable[[int], Indices]:
        """The order of a block's rows. Kept for twice as many blocks as lanes can be in, so that no turn over the lanes
        makes one anew."""
        sizes, seed, epoch = self.block_sizes, self.seed, self.epoch

        @lru_cache(2 * self.num_lanes)
        def rows(block: int) -> Indices:
            return permutation(sizes[block], key_of(seed, epoch, _ROWS, block))

        return rows
