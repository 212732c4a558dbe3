"""Which blocks a worker will need soon, so that they are read before, and not kept after."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np

from shoal.lanes import Order, Steps
from shoal.lanes.hashing import Indices
from shoal.sources.source import Reader

EVERY_STEPS = 8
"""How often it looks. As many steps may be gathered together."""


class ReadAhead:
    """Has a reader hold the blocks that lanes are in or soon will be, and no others.

    Lanes may all come to their next block in the same step. So the first of n lanes looks ahead some steps only, and
    the last half a block: their blocks are read one after another, and at most a quarter more is held than is in use.
    """

    def __init__(self, reader: Reader, order_of_epoch: Callable[[int], Order], steps: Steps, lanes: Indices) -> None:
        self._reader = reader
        self._order_of_epoch = order_of_epoch
        self._steps = steps
        self._lanes = lanes
        self._held: set[int] = set()
        self._next_step = -1

    def move_to(self, step: int) -> None:
        """``step`` is about to be gathered. Steps come one after another."""
        if step < self._next_step:
            return
        self._next_step = step + EVERY_STEPS
        turns = zip_longest(*self._blocks(step))  # what each lane needs first, then what each needs second
        wanted = dict.fromkeys(block for turn in turns for block in turn if block is not None)
        gone = self._held.difference(wanted)
        self._reader.expect([block for block in wanted if block not in self._held])
        self._reader.release(gone)
        self._held = set(wanted)

    def end(self) -> None:
        """Nothing is needed any more."""
        self._reader.release(self._held)
        self._held = set()

    def _blocks(self, step: int) -> list[list[int]]:
        """What each lane is in until the next look and some way beyond, in its order."""
        steps, lanes = self._steps, self._lanes
        epoch, _ = steps.locate(step)
        order = self._order_of_epoch(epoch)
        starts = steps.cursors(step)[lanes]
        half_a_block = steps.num_samples / max(1, len(order.block_sizes)) / 2
        soon = 2 * EVERY_STEPS * -(-steps.global_batch // steps.num_lanes)
        later = (half_a_block * np.arange(len(lanes)) / max(1, len(lanes))).astype(np.int64)
        sizes = np.asarray([order.lane_size(lane) for lane in lanes.tolist()], np.int64)
        stops = starts + soon + later
        found = order.blocks_of(lanes, starts, np.minimum(stops, sizes))
        if (stops > sizes).any() and (epoch + 1) * steps.steps_per_epoch < steps.total_steps:
            beyond = np.clip(stops - sizes, 0, sizes)
            next_epoch = self._order_of_epoch(epoch + 1).blocks_of(lanes, np.zeros_like(beyond), beyond)
            found = [now + then for now, then in zip(found, next_epoch, strict=True)]
        return found
