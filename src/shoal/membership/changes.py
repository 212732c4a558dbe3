"""Events in, actions out: the whole vocabulary of membership."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shoal.membership.balance import Cost
from shoal.membership.world import Lanes, Standing, World

# Events


@dataclass(frozen=True)
class Joined:
    """A newcomer is ready to enter. It holds nothing. ``unreachable`` are members that it cannot connect to."""

    worker: str
    unreachable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attached:
    """A worker that knew an earlier coordinator. ``halted``: it has stopped and waits for a world."""

    worker: str
    generation: int
    standing: Standing
    halted: bool


@dataclass(frozen=True)
class Lost:
    """A worker is dead, silent for too long, or stuck."""

    worker: str
    reason: str


@dataclass(frozen=True)
class Reported:
    """A member has stopped in ``generation`` and tells what it holds and whom it cannot reach."""

    worker: str
    generation: int
    standing: Standing
    unreachable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Healed:
    """A member without lanes has caught up with the others."""

    worker: str
    generation: int


@dataclass(frozen=True)
class DealTaken:
    """A member says that the deal of this number is in force."""

    generation: int
    number: int


@dataclass(frozen=True)
class LeaveAsked:
    """A worker asks to leave, or is asked to."""

    worker: str


@dataclass(frozen=True)
class Scaled:
    """The number of workers wanted has changed."""

    target: int


@dataclass(frozen=True)
class Stored:
    """A version is whole in the run's store."""

    standing: Standing


@dataclass(frozen=True)
class Finished:
    """A member has committed the last step and measured it."""

    worker: str
    generation: int
    standing: Standing


@dataclass(frozen=True)
class Stalled:
    """Every member waits for the others and nothing moves between them: a link is cut."""

    generation: int


@dataclass(frozen=True)
class Measured:
    """What a step costs each of the members. ``at_s``: when, on any one clock."""

    generation: int
    at_s: float
    costs: Mapping[str, Cost]


@dataclass(frozen=True)
class DeadlinePassed:
    """What was awaited (see ``Await``) has had its time."""

    phase: str
    generation: int


Event = (
    Joined
    | Attached
    | Lost
    | Reported
    | Healed
    | DealTaken
    | LeaveAsked
    | Scaled
    | Stored
    | Finished
    | Stalled
    | Measured
    | DeadlinePassed
)

# Actions


@dataclass(frozen=True)
class Announce:
    """Record this world under its number, if no one has; then tell its members."""

    world: World


@dataclass(frozen=True)
class Halt:
    """Tell the members to stop and report: at once, or at the first boundary that all of them can name.

    ``probe``: each is to try first which of the others it can reach. ``leaving``: at that boundary these hand over to
    the others what they alone hold.
    """

    generation: int
    members: tuple[str, ...]
    at_boundary: bool
    probe: bool = False
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True)
class Redeal:
    """Tell the members a new deal; it comes into force at the first boundary at which all have it.

    ``reason``: a member has healed and can take lanes, or they move from slow members to fast ones.
    """

    generation: int
    number: int
    members: tuple[str, ...]
    lanes: Lanes
    reason: Literal["healed", "balance"]


@dataclass(frozen=True)
class Dismiss:
    """Tell a worker that it is out. ``expelled``: it did not ask, and is to be ended and replaced."""

    worker: str
    reason: str
    expelled: bool


@dataclass(frozen=True)
class Await:
    """Start the clock on a phase; ``DeadlinePassed`` comes when it runs out. An earlier clock is forgotten."""

    phase: str
    generation: int


@dataclass(frozen=True)
class End:
    """The run is complete: every member has finished and the last version is stored."""


Action = Announce | Halt | Redeal | Dismiss | Await | End
