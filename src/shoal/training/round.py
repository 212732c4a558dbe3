"""A round: what a strategy makes one version from. One step, or as many as are computed between two exchanges."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import Bug
from shoal.lanes import Ledger, Steps
from shoal.lanes.hashing import Indices
from shoal.strategies import Agreed
from shoal.training.agent import Order
from shoal.training.rollcall import Roll


@dataclass(frozen=True)
class Round:
    """What all members have contributed to and is still to be committed. It leads to ``version``.

    ``held``: the version that every member held when it said so in the roll call. ``order``: what this member then held
    and ``roll`` tells whether all did.
    """

    version: int
    held: int
    epoch: int
    agreed: Agreed
    roll: Roll
    order: Order | None
    flags: Indices | None = None
    """(num_lanes,): 1 for each lane whose part of the round is in it; None if all are."""
    num_contributors: int = 0

    def lagging_after(self, base: int, lagging: Mapping[int, int]) -> dict[int, int]:
        """The lanes that do not stand at ``version`` once it is committed on ``base``, and where they stand."""
        behind = () if self.flags is None else np.flatnonzero(self.flags == 0).tolist()
        return {lane: lagging.get(lane, base) for lane in behind}


@dataclass
class Progress:
    """What a worker has done, by itself, of the round from version ``base`` to ``target``.

    The round begins with the lanes that were the worker's; where it must take over lost lanes at once, those follow in
    a stage of their own. ``slot`` counts the local steps of the stage that are done. ``lagging``: the lanes that stand
    before ``base``, and where.
    """

    base: int
    target: int
    stages: list[tuple[int, ...]]
    stage: int = 0
    slot: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    loss_sum: float = 0.0
    bad_step: int | None = None
    lagging: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return self.target - self.base

    @property
    def num_done(self) -> int:
        """The local steps that are done, over all stages."""
        return self.stage * self.num_slots + self.slot

    @property
    def is_done(self) -> bool:
        """Whether every local step has been made, or none more makes sense."""
        return self.bad_step is not None or self.stage >= len(self.stages)

    @property
    def lanes_done(self) -> tuple[int, ...]:
        """The lanes whose part of the round is done."""
        return tuple(lane for stage in self.stages[: self.stage] for lane in stage)

    def next_slot(self) -> None:
        """Another local step is done."""
        self.slot += 1
        self._end_stage()

    def fits(self, num_slots: int, lanes: Collection[int]) -> bool:
        """Whether something of it is done, and can be a part of a round of so many slots with these lanes."""
        own = [lane for stage in self.stages for lane in stage]
        return 0 < self.num_done <= num_slots and set(own) <= set(lanes)

    def lead_to(self, target: int) -> None:
        """Another target, not before what is done; of lanes that all stand at ``base``."""
        self.slot, self.stage, self.target = self.num_done, 0, target
        self._end_stage()

    def _end_stage(self) -> None:
        if self.slot >= self.num_slots:
            self.stage, self.slot = self.stage + 1, 0


def feeds(lanes: Iterable[int], base: int, lagging: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """The lanes by the step that they stand at before a round from ``base``."""
    found: dict[int, tuple[int, ...]] = {}
    for lane in lanes:
        step = lagging.get(lane, base)
        found[step] = (*found.get(step, ()), lane)
    return found


def first_of_slot(slot: int, reached: int, progress: Progress) -> int:
    """The first step that lanes which stand at ``reached`` take in a local step; the next slot's first ends it."""
    return reached + slot * (progress.target - reached) // progress.num_slots


def expected(steps: Steps, flags: Indices, base: int, target: int, lagging: Mapping[int, int]) -> Ledger:
    """What a round must come to over the lanes that are flagged: each by one worker, all that it had to do."""
    if (flags > 1).any():
        raise Bug(f"two workers did the same lanes: {np.flatnonzero(flags > 1).tolist()}")
    total = Ledger()
    for reached, lanes in feeds(np.flatnonzero(flags).tolist(), base, lagging).items():
        for span in steps.spans(reached, target):
            total = total + Ledger.expected(span, lanes)
    return total
