"""Which pushes are new: the steps that are done of each lane, and the generation in force. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Span = tuple[int, int]
"""Of a lane's steps: from, and up to."""


class Verdict(Enum):
    """What becomes of a push."""

    NEW = "new"
    """It continues each of its lanes: it is to be applied."""
    KNOWN = "known"
    """All of it has been applied: it is to be acknowledged again."""
    ZOMBIE = "zombie"
    """It is of a generation that is over."""
    AMISS = "amiss"
    """It neither continues its lanes nor repeats them: something before it is missing, or a part of it is known."""


@dataclass(frozen=True)
class Book:
    """What has been applied of each lane. The value does not change; ``after`` gives the next one."""

    generation: int = 0
    cursors: Mapping[int, int] = field(default_factory=dict)

    def cursor(self, lane: int) -> int:
        """How far a lane has been applied."""
        return self.cursors.get(lane, 0)

    def least(self, num_lanes: int) -> int:
        """How far the lane that is furthest behind has been."""
        return min((self.cursor(lane) for lane in range(num_lanes)), default=0)

    def judge(self, generation: int, spans: Mapping[int, Span]) -> Verdict:
        """What becomes of a push of the gradients of these lanes' steps."""
        if generation < self.generation:
            return Verdict.ZOMBIE
        if all(start == self.cursor(lane) < stop for lane, (start, stop) in spans.items()):
            return Verdict.NEW
        if all(start < stop <= self.cursor(lane) for lane, (start, stop) in spans.items()):
            return Verdict.KNOWN
        return Verdict.AMISS

    def after(self, generation: int, spans: Mapping[int, Span]) -> Book:
        """Once a new push is applied."""
        return Book(max(generation, self.generation), {**self.cursors, **{n: stop for n, (_, stop) in spans.items()}})

    def begin(self, generation: int) -> Book:
        """Once a generation is in force: those before it are over, whoever still speaks for them."""
        return Book(max(generation, self.generation), self.cursors)
