"""A coordinator without sockets and clocks: it does with the machine's actions what the real process does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.membership import (
    NOTHING,
    Action,
    Announce,
    Attached,
    Await,
    DeadlinePassed,
    Dismiss,
    End,
    Event,
    Halt,
    Joined,
    Redeal,
    Standing,
    Stored,
    begin,
    step,
    take_over,
)
from tests.membership.workers import Beat, WhoAreYou

if TYPE_CHECKING:
    from tests.membership.simulator import Cluster


class Coordinator:
    """One process. ``over``: it has stopped; ``ended``: because the run is complete."""

    def __init__(self, cluster: Cluster, target: int) -> None:
        self.cluster = cluster
        self.known: set[str] = set()
        self.expelled: set[str] = set()
        self.deadline: tuple[str, int] | None = None
        self.over = False
        self.ended = False
        truth = cluster.truth
        self.state = begin(cluster.rules, target, self._newest_stored())
        if truth.records:
            self.state, actions = take_over(self.state, truth.records[max(truth.records)])
            self._carry_out(actions)

    def _newest_stored(self) -> Standing:
        store = self.cluster.truth.store
        return Standing(max(store), store[max(store)]) if store else NOTHING

    def handle(self, worker: str, event: Event | Beat) -> None:
        if self.over:
            return
        if worker in self.expelled:
            self._send(worker, Dismiss(worker, "the others went on without it", expelled=True))
        elif isinstance(event, Joined | Attached):
            self.known.add(worker)
            self.apply(event)
        elif worker not in self.known:
            self._send(worker, WhoAreYou())
        elif not isinstance(event, Beat):
            self.apply(event)

    def apply(self, event: Event) -> None:
        if self.over:
            return
        state, actions = step(self.state, event)
        if any(isinstance(action, Announce) for action in actions):
            # A version may be whole in the store though the message that says so was lost with its sender.
            before, said = step(self.state, Stored(self._newest_stored()))
            state, actions = step(before, event)
            actions = [*said, *actions]
        self.state = state
        self._carry_out(actions)

    def fire_deadline(self) -> None:
        if self.deadline is not None:
            phase, generation = self.deadline
            self.deadline = None
            self.apply(DeadlinePassed(phase, generation))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Announce():
                    self._announce(action)
                case Halt() | Redeal():
                    if isinstance(action, Redeal):
                        self.cluster.check_redeal(action)
                    for member in action.members:
                        self._send(member, action)
                case Dismiss():
                    self._send(action.worker, action)
                    self.known.discard(action.worker)
                    self.expelled |= {action.worker} if action.expelled else set()
                case Await():
                    self.deadline = (action.phase, action.generation)
                case End():
                    assert self.state.world is not None
                    self.cluster.check_end(self.state.world)
                    self.over = self.ended = True

    def _announce(self, action: Announce) -> None:
        records, world = self.cluster.truth.records, action.world
        if world.generation in records:
            self.over = True
            return
        assert not set(world.members) & self.expelled, "who was expelled may not come back under its name"
        self.cluster.check_world(world, self.state.target, frozenset(self.state.pool))
        records[world.generation] = world
        for member in world.members:
            self._send(member, action)

    def _send(self, worker: str, message: object) -> None:
        process = self.cluster.workers.get(worker)
        if process is not None and process.alive and self.cluster.link_of.get(worker) is self:
            process.inbox.append(message)
