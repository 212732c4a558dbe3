"""Which samples belong to which step, whoever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shoal.errors import ConfigError
from shoal.lanes.hashing import Indices
from shoal.lanes.order import lane_bounds


@dataclass(frozen=True, eq=False)
class Span:
    """What one step takes: from lane l the samples ``starts[l]`` up to ``stops[l]``. Shapes (num_lanes,) int64."""

    epoch: int
    starts: Indices
    stops: Indices
    num_samples: int


@dataclass(frozen=True)
class Steps:
    """The steps of a job. An epoch's samples are dealt to its steps by turns over the lanes.

    Turn p takes the next sample of the lane at place p mod num_lanes; the places are in bit-reversed order, so that a
    batch smaller than the number of lanes is still spread evenly over them. An epoch ends with a short batch if the
    global batch does not divide it: nothing is padded or dropped. Give ``epochs`` or ``total_steps``.
    """

    num_samples: int
    global_batch: int
    num_lanes: int
    epochs: int | None = None
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError("training needs at least one sample, and the source has none")
        if self.global_batch < 1 or self.num_lanes < 1:
            raise ConfigError(f"global_batch ({self.global_batch}) and num_lanes ({self.num_lanes}) must be at least 1")
        if (self.epochs is None) == (not self.total_steps):
            raise ConfigError("give either epochs or total_steps, and not both")
        if (self.total_steps if self.epochs is None else self.epochs) < 1:
            raise ConfigError(f"epochs ({self.epochs}) or total_steps ({self.total_steps}) must be at least 1")
        if self.epochs is not None:
            object.__setattr__(self, "total_steps", self.epochs * self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and how many steps of that epoch come before it."""
        return divmod(step, self.steps_per_epoch)

    def cursors(self, step: int) -> Indices:
        """(num_lanes,): how many samples of its epoch each lane has given when ``step`` begins."""
        _, within = self.locate(step)
        return self._given(within * self.global_batch)

    def span(self, step: int) -> Span:
        """What ``step`` takes."""
        epoch, within = self.locate(step)
        first = within * self.global_batch
        last = min(first + self.global_batch, self.num_samples)
        return Span(epoch, self._given(first), self._given(last), last - first)

    def spans(self, start: int, stop: int) -> list[Span]:
        """What the steps from ``start`` up to ``stop`` take together: a span an epoch."""
        found = []
        while start < stop:
            epoch, within = self.locate(start)
            last = min(stop, (epoch + 1) * self.steps_per_epoch)
            first, end = within * self.global_batch, (within + last - start) * self.global_batch
            end = min(end, self.num_samples)
            found.append(Span(epoch, self._given(first), self._given(end), end - first))
            start = last
        return found

    def _given(self, turns: int) -> Indices:
        """How many samples each lane has given after this many turns of an epoch."""
        rounds = min(turns // self.num_lanes, self.num_samples // self.num_lanes)
        given = np.full(self.num_lanes, rounds, np.int64)
        willing = self._places if rounds < self.num_samples // self.num_lanes else self._longer
        given[willing[: turns - rounds * self.num_lanes]] += 1
        return given

    @cached_property
    def _longer(self) -> Indices:
        """The places of the lanes that have a sample more than others."""
        sizes = np.diff(np.asarray(lane_bounds(self.num_samples, self.num_lanes), np.int64))
        return self._places[sizes[self._places] > self.num_samples // self.num_lanes]

    @cached_property
    def _places(self) -> Indices:
        """The lanes in bit-reversed order."""
        bits = max(1, (self.num_lanes - 1).bit_length())
        reversed_ = [int(format(lane, f"0{bits}b")[::-1], 2) for lane in range(1 << bits)]
        return np.asarray([lane for lane in reversed_ if lane < self.num_lanes], np.int64)
