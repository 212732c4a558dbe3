"""Workers as membership sees them: what each holds, when it stops, and what it says."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shoal.membership import (
    NOTHING,
    Announce,
    Attached,
    DealTaken,
    Dismiss,
    Event,
    Finished,
    Halt,
    Healed,
    Joined,
    LeaveAsked,
    Origin,
    Redeal,
    Reported,
    Standing,
    Stored,
    World,
)


@dataclass(frozen=True)
class Beat:
    """A message that only shows who is there."""


@dataclass(frozen=True)
class WhoAreYou:
    """What a coordinator answers to a worker that it does not know."""


Order = Halt | Redeal | None


@dataclass
class Truth:
    """What no process knows: every version's ancestor, the store, the collectives, the links that are cut."""

    total_steps: int
    parents: dict[Standing, Standing] = field(default_factory=dict)
    stable: set[Standing] = field(default_factory=set)
    store: dict[int, str] = field(default_factory=dict)
    records: dict[int, World] = field(default_factory=dict)
    present: dict[tuple[int, int], dict[str, Order]] = field(default_factory=dict)
    """By (generation, step): who has come to the collective that makes the next step, and which order each held."""
    offers: set[tuple[int, str]] = field(default_factory=set)
    cuts: set[frozenset[str]] = field(default_factory=set)

    def version(self, world: World, step: int) -> Standing:
        """What ``step`` is in this generation."""
        if step > world.base.step:
            return Standing(step, f"{step}@{world.generation}")
        return world.base if world.origin is not Origin.SEED else Standing(0, "seed")

    def complete(self, world: World, step: int) -> bool:
        cut = any(pair <= set(world.members) for pair in self.cuts)
        return not cut and self.present.get((world.generation, step), {}).keys() == set(world.members)

    def agreed_order(self, world: World, step: int) -> Order:
        first, *rest = self.present[world.generation, step].values()
        return first if all(order == first for order in rest) else None

    def put(self, version: Standing) -> None:
        assert version in self.stable, "only a version that every member holds may leave the workers"
        there = self.store.setdefault(version.step, version.fingerprint)
        assert there == version.fingerprint, f"two versions bear one number: {version} and {there}"

    def cut_from(self, worker: str) -> frozenset[str]:
        return frozenset(peer for pair in self.cuts if worker in pair for peer in pair - {worker})


@dataclass
class Worker:
    """One process. ``outbox`` and ``inbox`` are its link to the coordinator, in order."""

    name: str
    truth: Truth
    alive: bool = True
    frozen: bool = False
    generation: int = 0
    rests: bool = True
    held: Standing = NOTHING
    world: World | None = None
    step: int = -1
    shadows: bool = False
    order: Order = None
    asked_generation: int = 0
    wants_to_leave: bool = False
    dismissed: bool = False
    outbox: deque[Event | Beat] = field(default_factory=deque)
    inbox: deque[object] = field(default_factory=deque)

    @property
    def acts(self) -> bool:
        return self.alive and not self.frozen

    @property
    def trains(self) -> bool:
        return self.acts and not self.rests

    def say_hello(self) -> None:
        self.outbox.append(Joined(self.name, self.truth.cut_from(self.name)))

    def ask_to_leave(self) -> None:
        self.wants_to_leave = True
        self.outbox.append(LeaveAsked(self.name))

    # What it is told

    def receive(self) -> None:
        message = self.inbox.popleft()
        match message:
            case Announce():
                self._enter(message.world)
            case Halt():
                self._pause(message)
            case Redeal() if message.generation == self.generation:
                self.order = message
            case Dismiss():
                self.alive, self.dismissed = False, True
            case WhoAreYou():
                self._introduce()

    def _introduce(self) -> None:
        if self.generation == 0:
            self.say_hello()
        else:
            standing = self.held if self.rests else Standing(self.step)
            self.outbox.append(Attached(self.name, self.generation, standing, self.rests))
        if self.wants_to_leave:
            self.outbox.append(LeaveAsked(self.name))

    def _enter(self, world: World) -> None:
        if world.generation <= self.generation:
            return
        self.generation, self.world, self.rests, self.order = world.generation, world, False, None
        self.step, self.shadows = world.base.step, self.name in world.sources
        if world.origin is Origin.SEED:
            assert self.held == NOTHING, "what was committed may not be started again"
            self.held = self.truth.version(world, 0)
        elif world.origin is Origin.STORE:
            assert self.truth.store.get(world.base.step) == world.base.fingerprint
            self.held = world.base
        elif not self.shadows and self.held != world.base:
            self.stop()
            return
        if self.name in world.sources.values():
            self.truth.offers.add((world.generation, self.name))

    def _pause(self, halt: Halt) -> None:
        if halt.generation < self.generation:
            return
        self.asked_generation = halt.generation
        if self.rests:
            self.outbox.append(Reported(self.name, halt.generation, self.held))
        elif halt.at_boundary and halt.generation == self.generation:
            self.order = halt
        else:
            self.stop(probe=halt.probe)

    # What it does

    def stop(self, *, probe: bool = True) -> None:
        """Its collectives have failed, or were aborted."""
        cut = self.truth.cut_from(self.name) & set(self.world.members) if probe and self.world else frozenset()
        self.rests, self.shadows, self.order = True, False, None
        number = max(self.generation, self.asked_generation)
        self.outbox.append(Reported(self.name, number, self.held, frozenset(cut)))

    def move(self) -> bool:
        """Come to the next collective, or commit what it agreed; False if it has to wait for others."""
        world, truth = self.world, self.truth
        assert world is not None
        present = truth.present.setdefault((world.generation, self.step), {})
        if self.name not in present:
            if self.shadows and self.step == truth.total_steps:
                return False
            present[self.name] = self.order
            return True
        if not truth.complete(world, self.step):
            return False
        truth.stable.add(truth.version(world, self.step))
        order = truth.agreed_order(world, self.step)
        if self.step == truth.total_steps:
            self._finish(world, order)
        else:
            self._commit(world, order)
        return True

    def _commit(self, world: World, order: Order) -> None:
        self.step += 1
        if not self.shadows:
            self._hold(self.truth.version(world, self.step))
        self._obey(order)

    def _hold(self, version: Standing) -> None:
        parent = self.truth.parents.setdefault(version, self.held)
        assert parent == self.held, f"{version} was made of {parent} and of {self.held}"
        self.held = version

    def _obey(self, order: Order) -> None:
        if isinstance(order, Halt):
            self.stop(probe=False)
        elif isinstance(order, Redeal):
            self.order = None if self.order is order else self.order
            self.outbox.append(DealTaken(order.generation, order.number))

    def _finish(self, world: World, order: Order) -> None:
        if isinstance(order, Halt):
            self.stop(probe=False)
            return
        if self.leads and not self.save_newest_stable():
            self.stop()
            return
        self.outbox.append(Finished(self.name, world.generation, self.held))
        self.rests = True
        if isinstance(self.order, Halt):
            self.outbox.append(Reported(self.name, self.order.generation, self.held))
        self.order = None

    @property
    def leads(self) -> bool:
        world = self.world
        return world is not None and next(m for m in world.members if m not in world.sources) == self.name

    def save_newest_stable(self) -> bool:
        """The leader stores what all members hold; False if it must not, or another generation has begun."""
        if not self.leads or self.held not in self.truth.stable or self.generation != max(self.truth.records):
            return False
        self.truth.put(self.held)
        self.outbox.append(Stored(self.held))
        return True

    def heal(self) -> bool:
        """Copy the base, then replay what the others have committed since; False if its source is not there."""
        world = self.world
        assert world is not None
        if (world.generation, world.sources[self.name]) not in self.truth.offers:
            return False
        if self.held.fingerprint != world.base.fingerprint and self.held.step < world.base.step:
            self.held = world.base
            return True
        self.held = self.truth.version(world, self.step)
        self.shadows = False
        self.outbox.append(Healed(self.name, world.generation))
        return True
