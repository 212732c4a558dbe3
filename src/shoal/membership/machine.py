"""Membership as a pure function: ``step(state, event) -> (state, actions)``.

A run is always in one phase. *gathering*: too few workers, or their state is being collected. *running*: a world is
announced. *halting*: its members have been told to stop, and their reports are awaited. *attaching*: this coordinator
has replaced one that died, and the members of the last recorded world are awaited. *ended*.

There is one way from a world to the next, whatever happened: halt, reports, announce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from shoal.lanes import deal
from shoal.membership.balance import Balance, consider, paces_of, share_out
from shoal.membership.changes import (
    Action,
    Announce,
    Attached,
    Await,
    DeadlinePassed,
    DealTaken,
    Dismiss,
    End,
    Event,
    Finished,
    Halt,
    Healed,
    Joined,
    LeaveAsked,
    Lost,
    Measured,
    Redeal,
    Reported,
    Scaled,
    Stalled,
    Stored,
)
from shoal.membership.choice import choose_base, drop_unreachable, moved
from shoal.membership.world import NOTHING, Origin, Rules, Standing, World


class Phase(StrEnum):
    """Where a run's membership stands."""

    GATHERING = "gathering"
    RUNNING = "running"
    HALTING = "halting"
    ATTACHING = "attaching"
    ENDED = "ended"


@dataclass(frozen=True)
class State:
    """Everything that membership remembers. ``pool`` holds who is present and stands outside a running world."""

    rules: Rules
    phase: Phase = Phase.GATHERING
    target: int = 1
    world: World | None = None
    generation: int = 0
    pool: Mapping[str, Standing] = field(default_factory=dict)
    unreachable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    """Members of the world that are lost; empty again in the next one."""
    awaited: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    departed: frozenset[str] = frozenset()
    """Who was lost or has left. A name is never used again, so a late message of theirs brings no one back."""
    healing: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    stored: Standing = NOTHING
    deal_number: int = 0
    deal_in_flight: bool = False
    deal_wanted: bool = False
    balance: Balance = field(default_factory=Balance)
    enough_time: bool = False
    """The gathering's deadline has passed: start with as few as the rules allow."""
    moved: frozenset[int] = frozenset()
    """The lanes that last lost their worker: where a part of a round went with it they have more to do in the next, so
    a newcomer gets no more and no less of them than everyone else."""
    planned: bool = False
    """The halt under way waits for a boundary that all members can name."""
    resumed: bool = False
    """Some members did not come back to a replaced coordinator in time, or had stopped before."""

    @property
    def members(self) -> tuple[str, ...]:
        if self.world is None or self.phase is Phase.GATHERING:
            return ()
        return tuple(m for m in self.world.members if m not in self.gone)

    @property
    def present(self) -> frozenset[str]:
        return frozenset(self.members) | frozenset(self.pool)


Result = tuple[State, list[Action]]


def begin(rules: Rules, target: int, stored: Standing = NOTHING) -> State:
    """A run that no worker has joined yet; ``stored`` is the newest good version in its store, if there is one."""
    return State(rules=rules, target=target, stored=stored)


def take_over(state: State, world: World) -> Result:
    """Go on after a coordinator that died, from the newest world in the run's store."""
    taken = replace(
        state, phase=Phase.ATTACHING, world=world, generation=world.generation, awaited=frozenset(world.members)
    )
    return taken, [Await(Phase.ATTACHING, world.generation)]


def step(state: State, event: Event) -> Result:
    """The next state, and what is to be done. Events that come late or twice change nothing."""
    if state.phase is Phase.ENDED:
        return state, []
    match event:
        case Joined():
            return _joined(state, event)
        case Attached():
            return _attached(state, event)
        case Lost():
            return _lost(state, event)
        case Reported():
            return _reported(state, event)
        case Healed():
            return _healed(state, event)
        case DealTaken():
            return _deal_taken(state, event)
        case LeaveAsked():
            return _leave_asked(state, event)
        case Scaled():
            return _scaled(replace(state, target=event.target))
        case Stored():
            return _end_if_done(replace(state, stored=max(state.stored, event.standing)))
        case Finished():
            return _finished(state, event)
        case Stalled():
            return _stalled(state, event)
        case Measured():
            return _measured(state, event)
        case DeadlinePassed():
            return _deadline_passed(state, event)


def _joined(state: State, event: Joined) -> Result:
    newcomer = event.worker not in state.present
    if state.phase is Phase.ATTACHING and event.worker in state.awaited:
        # The world that names it was recorded, and its coordinator died before it could tell.
        return _resume_if_all(replace(state, awaited=state.awaited - {event.worker}, resumed=True))
    if event.worker in state.departed or (not newcomer and state.pool.get(event.worker) != NOTHING):
        return state, []
    state = replace(
        state,
        pool={**state.pool, event.worker: NOTHING},
        unreachable={**state.unreachable, event.worker: event.unreachable},
    )
    if state.phase is Phase.RUNNING and _can_admit(state, event.worker):
        return _halt(state, at_boundary=not state.rules.in_rounds)
    if state.phase is Phase.GATHERING:
        first = [Await(Phase.GATHERING, state.generation)] if newcomer and len(state.pool) == 1 else []
        state, actions = _form(state)
        return state, [*first, *actions]
    return state, []


def _can_admit(state: State, worker: str) -> bool:
    staying = [m for m in state.members if m not in state.leaving]
    return len(staying) < _most(state) and not state.unreachable.get(worker, frozenset()) & set(staying)


def _most(state: State) -> int:
    return min(max(state.target, state.rules.min_workers), state.rules.max_workers)


def _attached(state: State, event: Attached) -> Result:
    world = state.world
    if event.worker in state.present and state.phase is not Phase.ATTACHING:
        return state, []
    if world is None or event.worker not in state.members or event.generation > world.generation:
        reason = "it belongs to no generation of this run that is still alive"
        return state, [Dismiss(event.worker, reason, expelled=True)]
    stopped = event.halted or event.generation < world.generation
    if stopped:
        state = replace(state, pool={**state.pool, event.worker: event.standing}, resumed=True)
    state = replace(state, awaited=state.awaited - {event.worker})
    return _resume_if_all(state)


def _resume_if_all(state: State) -> Result:
    """Once every member has come back or is lost, one planned halt leads to a generation of our own."""
    if state.awaited:
        return state, []
    return _halt(replace(state, phase=Phase.RUNNING), at_boundary=not state.resumed)


def _expel(worker: str) -> Dismiss:
    return Dismiss(worker, "it was silent for too long, and the others went on without it", expelled=True)


def _lost(state: State, event: Lost) -> Result:
    worker = event.worker
    if worker not in state.present:
        return state, []
    out: list[Action] = [Dismiss(worker, event.reason, expelled=True)]
    was_member = worker in state.members
    state = _forget(state, worker)
    if not was_member:
        return state, out
    if state.phase is Phase.ATTACHING:
        state, actions = _resume_if_all(replace(state, resumed=True))
    elif state.phase is Phase.RUNNING:
        state, actions = _halt(state, at_boundary=False)
    elif state.awaited:
        # A planned halt's boundary needs every member, and one is gone.
        state, actions = _hurry(state)
    else:
        state, actions = _form_if_all_reported(state)
    return state, out + actions


def _forget(state: State, worker: str) -> State:
    return replace(
        state,
        pool={w: s for w, s in state.pool.items() if w != worker},
        unreachable={w: u for w, u in state.unreachable.items() if w != worker},
        gone=state.gone | ({worker} & set(state.members)),
        awaited=state.awaited - {worker},
        leaving=state.leaving - {worker},
        departed=state.departed | {worker},
    )


def _halt(state: State, *, at_boundary: bool, probe: bool = False) -> Result:
    """Tell those who still run; members already in the pool have stopped."""
    awaited = frozenset(state.members) - frozenset(state.pool)
    state = replace(
        state, phase=Phase.HALTING, awaited=awaited, planned=at_boundary, deal_in_flight=False, deal_wanted=False
    )
    wait = Await(Phase.HALTING, state.generation)
    leaving = tuple(sorted(state.leaving & awaited)) if at_boundary else ()
    halt = Halt(state.generation, tuple(sorted(awaited)), at_boundary, probe, leaving)
    out: list[Action] = [halt, wait] if awaited else []
    state, actions = _form_if_all_reported(state)
    return state, out + actions


def _hurry(state: State, *, probe: bool = False) -> Result:
    """Tell those who still run to stop at once, and give them their time anew."""
    halt = Halt(state.generation, tuple(sorted(state.awaited)), at_boundary=False, probe=probe)
    return replace(state, planned=False), [halt, Await(Phase.HALTING, state.generation)]


def _stalled(state: State, event: Stalled) -> Result:
    """A cut link keeps members from a planned halt's boundary too."""
    if event.generation != state.generation:
        return state, []
    if state.phase is Phase.RUNNING:
        return _halt(state, at_boundary=False, probe=True)
    return _hurry(state, probe=True) if state.phase is Phase.HALTING and state.planned else (state, [])


def _reported(state: State, event: Reported) -> Result:
    if state.world is None or event.generation != state.generation or event.worker not in state.members:
        known = event.worker in state.present
        return state, [] if known else [_expel(event.worker)]
    if state.phase not in (Phase.RUNNING, Phase.HALTING):
        return state, []
    actions: list[Action] = []
    was_running = state.phase is Phase.RUNNING
    if not was_running and event.worker not in state.awaited:
        return state, []
    state = replace(
        state,
        pool={**state.pool, event.worker: event.standing},
        unreachable={**state.unreachable, event.worker: event.unreachable},
    )
    if was_running:
        state, actions = _halt(state, at_boundary=False)
    state = replace(state, awaited=state.awaited - {event.worker})
    state, more = _form_if_all_reported(state)
    return state, actions + more


def _form_if_all_reported(state: State) -> Result:
    if state.phase is not Phase.HALTING or state.awaited:
        return state, []
    return _form(replace(state, phase=Phase.GATHERING, enough_time=True))


def _form(state: State) -> Result:
    """Announce the next world, if enough workers are there; else wait for more."""
    free = {w: s for w, s in state.pool.items() if w not in state.leaving}
    staying, cut_off = drop_unreachable(free, state.unreachable, _most(state))
    source = _leaver_to_copy(state, staying)
    if source is not None:
        staying = [source, *staying[: _most(state) - 1]]
    goodbyes: list[Action] = []
    for worker in sorted(state.leaving & set(state.pool) - {source}):
        goodbyes.append(Dismiss(worker, "it asked to leave", expelled=False))
        state = _forget(state, worker)
    for worker in cut_off:
        goodbyes.append(Dismiss(worker, "it cannot reach the other workers", expelled=True))
        state = _forget(state, worker)
    need = state.rules.min_workers if state.enough_time else _most(state)
    if len(staying) < need:
        return replace(state, phase=Phase.GATHERING), goodbyes
    world = _next_world(state, staying)
    state = replace(
        state,
        moved=moved(state.world, world) or state.moved,
        phase=Phase.RUNNING,
        world=world,
        generation=world.generation,
        pool={w: s for w, s in state.pool.items() if w not in world.members},
        unreachable={w: u for w, u in state.unreachable.items() if w not in world.members},
        healing=frozenset(world.sources),
        finished=frozenset(),
        gone=frozenset(),
        awaited=frozenset(),
        deal_number=0,
        deal_in_flight=False,
        deal_wanted=False,
        balance=state.balance.among(world.members),
        enough_time=True,
        resumed=False,
    )
    return state, [*goodbyes, Announce(world)]


def _leaver_to_copy(state: State, staying: list[str]) -> str | None:
    """A worker that asked to leave and alone holds the newest version: it stays until the others have copied that."""
    if not staying or _most(state) < 2:
        return None
    best = max(state.stored.step, 0, *(state.pool[w].step for w in staying))
    holders = [w for w in state.leaving & set(state.pool) if state.pool[w].step > best]
    reached = [w for w in holders if not _is_cut(state, w, staying)]
    return min(reached, key=lambda w: (-state.pool[w].step, w), default=None)


def _is_cut(state: State, worker: str, others: list[str]) -> bool:
    missed = state.unreachable.get(worker, frozenset())
    return any(other in missed or worker in state.unreachable.get(other, ()) for other in others)


def _next_world(state: State, staying: list[str]) -> World:
    earlier = [m for m in (state.world.members if state.world else ()) if m in staying]
    members = (*earlier, *sorted(m for m in staying if m not in earlier))
    base, origin = choose_base(members, state.pool, state.stored)
    holders = [m for m in members if state.pool[m] == base]
    sources = {}
    if origin is Origin.PEERS:
        behind = [m for m in members if m not in holders]
        sources = {m: holders[i % len(holders)] for i, m in enumerate(behind)}
    return World(
        generation=state.generation + 1,
        members=members,
        lanes=_deal(state, members, frozenset(sources)),
        base=base,
        origin=origin,
        sources=sources,
    )


def _deal(state: State, members: tuple[str, ...], healing: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Equal shares, or once it is known how fast the members are, shares for which all take as long."""
    able = [m for m in members if m not in healing]
    previous = {m: lanes for m, lanes in state.world.lanes.items() if m in members} if state.world else {}
    known = state.balance.among(able).paces
    shares: Mapping[str, float] = dict.fromkeys(able, 1.0)
    if known:
        held = {m: len(lanes) for m, lanes in previous.items()}
        shares = share_out(paces_of(able, known), held, state.rules.num_lanes, state.balance.least_lanes)
    return deal(state.rules.num_lanes, {m: shares.get(m, 0.0) for m in members}, previous, state.moved)


def _healed(state: State, event: Healed) -> Result:
    if event.generation != state.generation or event.worker not in state.healing:
        return state, []
    state = replace(state, healing=state.healing - {event.worker})
    if state.phase is not Phase.RUNNING:
        return state, []
    if not state.healing and state.leaving & set(state.members):
        return _halt(state, at_boundary=True)
    return _redeal(state, "healed")


def _measured(state: State, event: Measured) -> Result:
    """Nothing is learned from a deal that is about to change, or while not all members compute."""
    settled = state.phase is Phase.RUNNING and not (state.deal_in_flight or state.healing or state.leaving)
    if not settled or state.world is None or event.generation != state.generation or len(state.members) < 2:
        return state, []
    if event.costs.keys() != set(state.members):
        return state, []
    shares = {m: len(state.world.lanes.get(m, ())) for m in state.members}
    balance, is_due = consider(state.balance, event.costs, event.at_s, shares, state.rules.hysteresis)
    state = replace(state, balance=balance)
    return _redeal(state, "balance") if is_due else (state, [])


def _redeal(state: State, reason: Literal["healed", "balance"]) -> Result:
    assert state.world is not None
    if state.deal_in_flight:
        return replace(state, deal_wanted=True), []
    lanes = _deal(state, state.members, state.healing)
    state = replace(
        state,
        world=replace(state.world, lanes=lanes),
        deal_number=state.deal_number + 1,
        deal_in_flight=True,
        deal_wanted=False,
        balance=state.balance if reason == "balance" else state.balance.among(state.members),
    )
    return state, [Redeal(state.generation, state.deal_number, state.members, lanes, reason)]


def _deal_taken(state: State, event: DealTaken) -> Result:
    in_force = event.generation == state.generation and event.number == state.deal_number
    if not in_force or not state.deal_in_flight or state.phase is not Phase.RUNNING:
        return state, []
    state = replace(state, deal_in_flight=False)
    return _redeal(state, "healed") if state.deal_wanted else (state, [])


def _leave_asked(state: State, event: LeaveAsked) -> Result:
    if event.worker not in state.present:
        return state, [Dismiss(event.worker, "it asked to leave", expelled=False)]
    if event.worker in state.leaving:
        return state, []
    state = replace(state, leaving=state.leaving | {event.worker})
    if event.worker in state.pool and state.phase is not Phase.HALTING:
        return _forget(state, event.worker), [Dismiss(event.worker, "it asked to leave", expelled=False)]
    if state.phase is Phase.RUNNING:
        return _halt(state, at_boundary=True)
    return state, []


def _scaled(state: State) -> Result:
    """Fewer: the last ranks leave. More: who waits is let in."""
    if state.phase is not Phase.RUNNING:
        return state, []
    staying = [m for m in state.members if m not in state.leaving]
    surplus = staying[_most(state) :]
    waiting = [w for w in sorted(state.pool) if _can_admit(state, w)]
    if not surplus and not waiting:
        return state, []
    return _halt(replace(state, leaving=state.leaving | set(surplus)), at_boundary=True)


def _finished(state: State, event: Finished) -> Result:
    if event.generation != state.generation or event.worker not in state.members:
        return state, []
    return _end_if_done(replace(state, finished=state.finished | {event.worker}))


def _end_if_done(state: State) -> Result:
    done = state.phase is Phase.RUNNING and state.finished >= set(state.members)
    if done and state.stored.step >= state.rules.total_steps:
        return replace(state, phase=Phase.ENDED), [End()]
    return state, []


def _deadline_passed(state: State, event: DeadlinePassed) -> Result:
    if event.phase != state.phase or event.generation != state.generation:
        return state, []
    if state.phase is Phase.GATHERING:
        return _form(replace(state, enough_time=True))
    if state.phase is Phase.HALTING and state.planned and state.awaited:
        return _hurry(state)
    actions: list[Action] = []
    for worker in sorted(state.awaited):
        state, more = _lost(state, Lost(worker, "it did not report in time"))
        actions += more
    return state, actions
