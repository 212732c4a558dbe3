"""What processes say to the coordinator, and what it says to them. Tagged msgspec structs, in msgpack."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.membership import Lanes, Standing, World

PROTOCOL = 4
"""Raised whenever a message changes; both sides must speak the same."""


class Message(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The base of every message."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be alike in all processes of a run, and where a worker is found."""

    protocol: int = PROTOCOL
    shoal: str
    torch: str
    job_hash: str
    host: str
    pid: int
    transfer_address: str


# Workers to the coordinator


class Hello(Message, frozen=True):
    """A newcomer that holds nothing asks to come in. Sent again, with what it cannot reach, while it waits."""

    identity: Identity
    unreachable: list[str] = []


class Attach(Message, frozen=True):
    """A worker that knew an earlier coordinator introduces itself to its replacement."""

    identity: Identity
    generation: int
    standing: Standing
    halted: bool


class Beat(Message, frozen=True):
    """I am alive. ``phase`` is what the training loop does, since ``phase_s``."""

    generation: int
    step: int
    stable_step: int
    phase: str
    phase_s: float
    figures: dict[str, float] = {}


class Report(Message, frozen=True):
    """I have stopped in this generation, and hold this."""

    generation: int
    standing: Standing
    unreachable: list[str] = []
    reason: str = ""


class Caught(Message, frozen=True):
    """I have caught up with the others of this generation, and can take lanes."""

    generation: int
    step: int


class Taken(Message, frozen=True):
    """The deal of this number is in force from this step on."""

    generation: int
    number: int
    step: int


class Leave(Message, frozen=True):
    """I want to leave at the next boundary."""


class Saved(Message, frozen=True):
    """A version is whole in the store."""

    standing: Standing


class Done(Message, frozen=True):
    """I have committed the last step, and these are the figures of the last evaluation.

    ``stored``: and I know that its version is whole in the store.
    """

    generation: int
    standing: Standing
    figures: dict[str, Any] = {}
    stored: bool = False


class Meet(Message, frozen=True):
    """A part of the address that this generation's collectives meet at, for all its members."""

    generation: int
    key: str
    value: bytes


class Note(Message, frozen=True):
    """An event for the run's log."""

    event: dict[str, Any]


class Failed(Message, frozen=True):
    """The job itself cannot go on, on any worker. ``kind`` names the error's class."""

    kind: str
    reason: str


# The driver, and commands, to the coordinator


class Watch(Message, frozen=True):
    """The driver announces itself: tell me what you want.

    ``target``, ``stopping``: what it heard last, for a coordinator that has replaced the one that said so. ``shards``:
    where the run's table shards are.
    """

    target: int
    stopping: bool
    shards: dict[str, str] = {}


class Exited(Message, frozen=True):
    """A process of the driver's has ended."""

    worker: str
    reason: str


class Scale(Message, frozen=True):
    """Go on with this many workers, or table shards, or both."""

    target: int | None = None
    shards: int | None = None


class Stop(Message, frozen=True):
    """End the run at the newest version."""

    reason: str


class Ask(Message, frozen=True):
    """How does the run stand?"""


ToCoordinator = (
    Hello | Attach | Beat | Report | Caught | Taken | Leave | Saved | Done | Meet | Note | Failed
    | Watch | Exited | Scale | Stop | Ask
)  # fmt: skip

# The coordinator to workers


class Welcome(Message, frozen=True):
    """You are known; wait for a world. ``peers`` are the members' transfer addresses."""

    coordinator: str
    peers: dict[str, str]


class Enter(Message, frozen=True):
    """A new generation, and where its members are found, and the run's table shards."""

    world: World
    addresses: dict[str, str]
    shards: dict[str, str] = {}


class Pause(Message, frozen=True):
    """Stop in this generation and report: at once, or at the first boundary at which all have got this.

    ``probe``: try first which of the others can be reached. ``leaving``: who hands over then what it alone holds.
    """

    generation: int
    at_boundary: bool
    probe: bool = False
    leaving: tuple[str, ...] = ()


class Deal(Message, frozen=True):
    """Other lanes, from the first boundary at which all have got this."""

    generation: int
    number: int
    lanes: Lanes


class Conclude(Message, frozen=True):
    """Store the version of the first boundary at which all have got this, and end there."""

    generation: int


class Dismissed(Message, frozen=True):
    """You are out."""

    reason: str
    expelled: bool


class Ended(Message, frozen=True):
    """The run is over. ``outcome`` is ``done``, ``stopped`` or ``failed``."""

    outcome: str
    reason: str
    kind: str = ""


class WhoAreYou(Message, frozen=True):
    """I do not know you; say ``Attach``."""

    coordinator: str


# The coordinator to drivers and commands


class Wanted(Message, frozen=True):
    """What the driver is to see to: how many workers, and which are to be ended; how many table shards, if that is not
    what it began with."""

    target: int
    expelled: list[str]
    stopping: bool
    shards: int | None = None


class Answer(Message, frozen=True):
    """How the run stands, or whether a command was taken."""

    ok: bool
    reason: str = ""
    status: dict[str, Any] = {}
    record: dict[str, Any] = {}


ToWorker = Welcome | Enter | Pause | Deal | Conclude | Dismissed | Ended | WhoAreYou | Meet
ToDriver = Wanted | Ended | Answer | WhoAreYou
