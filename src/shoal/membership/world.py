"""Who is in, what each holds, and what a generation is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from shoal.membership.balance import Hysteresis

Lanes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, order=True)
class Standing:
    """The newest step that a worker has committed, and the fingerprint of what it holds. Step -1: it holds nothing."""

    step: int = -1
    fingerprint: str = ""


NOTHING = Standing()


class Origin(StrEnum):
    """Where a generation's first state comes from."""

    SEED = "seed"
    """Every member builds it from the job's seed: step 0."""
    STORE = "store"
    """Every member loads the version of the base step from the run's store."""
    PEERS = "peers"
    """Some members hold it; the others copy it from them while training goes on."""


@dataclass(frozen=True)
class World:
    """One generation: its members by rank, whose lanes are whose, and the version that it goes on from.

    ``sources`` maps each member that lacks the base version to one that holds it; until it has healed it takes part
    without lanes.
    """

    generation: int
    members: tuple[str, ...]
    lanes: Lanes
    base: Standing
    origin: Origin
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What a run asks of its membership: how many lanes, how few or many workers, and when lanes move between them.

    ``in_rounds``: members compute by themselves for long, and what they did outlives a generation; so a newcomer is let
    in at once, to catch up while they go on, and not at the next boundary.
    """

    num_lanes: int = 64
    min_workers: int = 1
    max_workers: int = 1
    total_steps: int = 1
    hysteresis: Hysteresis = field(default_factory=Hysteresis)
    in_rounds: bool = False
