"""The order of an epoch's samples: which lane yields which rows of which blocks, in which order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from shoal.errors import ConfigError
from shoal.lanes.hashing import Indices, key_of, permutation

_BLOCKS, _ROWS = 1, 2


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of one block, in the order in which they are wanted."""

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

        Microseconds; the first slice in a block also permutes the block's rows, about 0.5 s a million.
        """
        parts = []
        for block, first, last in self._pieces(lane, start, stop):
            rows = self._rows(block)[first:last]
            parts.append(Part(block, rows[::-1].copy() if lane % 2 else rows))
        return parts

    def blocks_of(self, lane: int, start: int, stop: int) -> list[int]:
        """The blocks that hold the samples from ``start`` up to ``stop`` of a lane. Permutes no rows."""
        return [block for block, _, _ in self._pieces(lane, start, stop)]

    def _pieces(self, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(block, start, stop) for each block in this part of a lane, in the lane's order."""
        if not (0 <= lane < self.num_lanes and 0 <= start <= stop <= self.lane_size(lane)):
            raise ConfigError(f"lane {lane} of {self.num_lanes} yields no samples {start} to {stop}")
        if lane % 2:
            first, last = self._bounds[lane + 1] - stop, self._bounds[lane + 1] - start
        else:
            first, last = self._bounds[lane] + start, self._bounds[lane] + stop
        pieces = []
        position = bisect_right(self._ends, first)
        while first < last:
            block, end = self._blocks[position], self._ends[position]
            begin, upto = end - self.block_sizes[block], min(last, end)
            if first < upto:
                pieces.append((block, first - begin, upto - begin))
            first, position = upto, position + 1
        return pieces[::-1] if lane % 2 else pieces

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        return lane_bounds(self.num_samples, self.num_lanes)

    @cached_property
    def _blocks(self) -> list[int]:
        order: list[int] = permutation(len(self.block_sizes), key_of(self.seed, self.epoch, _BLOCKS)).tolist()
        return order

    @cached_property
    def _ends(self) -> list[int]:
        """Where each block of the line ends on it."""
        return list(accumulate(self.block_sizes[block] for block in self._blocks))

    @cached_property
    def _rows(self) -> Callable[[int], Indices]:
        """The order of a block's rows. Kept for twice as many blocks as lanes can be in, so that no turn over the lanes
        makes one anew."""
        sizes, seed, epoch = self.block_sizes, self.seed, self.epoch

        @lru_cache(2 * self.num_lanes)
        def rows(block: int) -> Indices:
            return permutation(sizes[block], key_of(seed, epoch, _ROWS, block))

        return rows
