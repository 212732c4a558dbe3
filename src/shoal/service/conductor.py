"""Carries a roll-out out: tells the state machine what happens, and does what it says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.clock import Clock, SystemClock
from shoal.errors import ConfigError, Fault, ShoalError
from shoal.rollout import Check, Observed, Policy, State, begin, machine, step
from shoal.service.gate import looked_at
from shoal.service.release import Pool, Release, Tally, Witness
from shoal.service.switch import Switch, observed
from shoal.service.wire import Source
from shoal.serving.batching import Batching

_log = logging.getLogger(__name__)

_LOOK_S = 0.05


class Stock(Protocol):
    """The versions that there are to serve. May read from disks, so it is asked in a thread."""

    def newest(self) -> int | None: ...

    def steps(self) -> Sequence[int]: ...

    def source(self, version: int) -> Source:
        """``ConfigError`` if there is no such version."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``num_replicas``: processes for each loaded version. ``follows``: new versions are taken as they come; they are
    looked for every ``poll_s``."""

    num_replicas: int = 1
    batching: Batching = field(default_factory=Batching)
    policy: Policy = field(default_factory=Policy)
    follows: bool = False
    poll_s: float = 0.1

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"replicas must be at least 1, not {self.num_replicas}")


class Conductor:
    """Within one event loop. ``witness`` is told each decision, with its reasons."""

    def __init__(
        self, stock: Stock, switch: Switch, pool: Pool, plan: Plan, witness: Witness, clock: Clock | None = None
    ) -> None:
        self._stock = stock
        self._switch = switch
        self._pool = pool
        self._plan = plan
        self._witness = witness
        self._clock = clock or SystemClock()
        self._state = begin(plan.policy)
        self._releases: dict[int, Release] = {}
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._gates: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._before = Observed()
        self._last_refusal: tuple[str, ...] = ()
        self._changed = asyncio.Event()

    @property
    def state(self) -> State:
        return self._state

    async def start(self, version: int | None = None) -> None:
        """Serve a version, by default the newest. Following, it need not be there yet. ``ConfigError`` if there is
        none, ``Fault`` if it is refused."""
        chosen = version if version is not None else await asyncio.to_thread(self._stock.newest)
        if chosen is None:
            if self._plan.follows:
                return
            raise ConfigError("no version is stored yet: wait for one, or follow the run with --follow")
        await asyncio.to_thread(self._stock.source, chosen)
        self._tell(machine.Found(chosen))
        while self._state.live is None and chosen not in self._state.refused:
            self._changed.clear()
            await self._changed.wait()
        if self._state.live is None and not self._plan.follows:
            raise Fault(f"version {chosen} cannot be served: {'; '.join(self._last_refusal)}")

    async def run(self) -> None:
        """Look at what happens, until it is cancelled."""
        polling = asyncio.create_task(self._poll()) if self._plan.follows else None
        try:
            while True:
                await asyncio.sleep(_LOOK_S)
                self._tell(self._looked())
        finally:
            if polling is not None:
                polling.cancel()

    async def _poll(self) -> None:
        trouble = ""
        while True:
            newest, before, trouble = None, trouble, ""
            try:
                newest = await asyncio.to_thread(self._stock.newest)
            except Exception as error:  # noqa: BLE001 - whatever it is, those that come later are to be found
                trouble = _told(error)
                if trouble != before:
                    is_known = isinstance(error, ShoalError | OSError)
                    _log.warning("the run's versions cannot be read: %s", trouble, exc_info=not is_known)
            if newest is not None:
                self._tell(machine.Found(newest))
            await asyncio.sleep(self._plan.poll_s)

    def _looked(self) -> machine.Looked:
        switch = self._switch
        live = observed(switch.live.tally) if switch.live is not None else Observed()
        if switch.candidate is not None:
            return machine.Looked(observed(switch.candidate.tally), live)
        return machine.Looked(live, self._before)

    async def promote(self, version: int | None = None) -> None:
        """Have the candidate, or this version, answer, whatever it shows. Returns once it does. ``ConfigError`` if
        there is none, ``Fault`` if it cannot be loaded."""
        if version is not None:
            await asyncio.to_thread(self._stock.source, version)
        asking: asyncio.Task[machine.Candidate | None] = self._task(self._ask_to_promote(version))
        candidate = await asyncio.shield(asking)  # it goes on if whoever asked goes away
        while candidate is not None and self._state.candidate == candidate:
            self._changed.clear()
            await self._changed.wait()
        if candidate is not None and candidate.version in self._state.refused:
            raise Fault(f"version {candidate.version} cannot be served: {'; '.join(self._last_refusal)}")

    async def _ask_to_promote(self, version: int | None) -> machine.Candidate | None:
        """A candidate that is at its gate is looked at no further, for a process that measures answers nobody: it is
        live once it can answer with all its processes."""
        candidate = self._state.candidate
        if candidate is not None and candidate.stage is machine.Stage.GATE and version in (None, candidate.version):
            version = candidate.version
            await self._leave_gate(version)
        self._tell(machine.PromoteAsked(version))
        return self._state.candidate

    async def _leave_gate(self, version: int) -> None:
        if version in self._gates:
            self._gates[version].cancel()
            await asyncio.gather(self._gates[version], return_exceptions=True)
        try:
            if version in self._releases:
                await self._releases[version].whole(self._pool.loading.most_s)
        except Fault as error:
            self._tell(machine.Gated(version, (Check("processes", False, error.message),)))

    def rollback(self) -> None:
        """Give up the candidate that sees requests, or have the version before the live one answer, from now on.
        ``ConfigError`` if there is neither."""
        self._tell(machine.RollbackAsked())

    def status(self) -> dict[str, Any]:
        """What is loaded, and what is stored."""
        state, candidate = self._state, self._state.candidate
        loaded = {
            version: {"pids": release.pids, "stored_s": release.held.stored_s, "figures": release.figures}
            for version, release in self._releases.items()
        }
        on_way = None if candidate is None else {"version": candidate.version, "stage": candidate.stage.value}
        return {
            "live": state.live, "previous": state.previous, "candidate": on_way, "share": self._switch.share,
            "refused": sorted(state.refused), "loaded": loaded, "waiting": self._num_waiting(),
        }  # fmt: skip

    def _num_waiting(self) -> int:
        return sum(release.batcher.num_waiting for release in self._releases.values())

    async def close(self) -> None:
        """Finish what was asked, and end all processes."""
        for task in (*self._loading.values(), *self._tasks):
            task.cancel()
        await asyncio.gather(*self._loading.values(), *self._tasks, return_exceptions=True)
        await asyncio.gather(*(release.close() for release in self._releases.values()))
        await self._pool.close()

    # Events to actions

    def _tell(self, event: machine.Event) -> None:
        """``ConfigError`` if it was a demand that cannot be met."""
        before = self._state
        self._state, actions = step(before, event, self._clock.monotonic_s())
        for action in actions:
            self._do(action)
        if self._state is not before:
            self._changed.set()

    def _do(self, action: machine.Action) -> None:
        match action:
            case machine.Load(version):
                self._loading[version] = self._task(self._load(version))
            case machine.Gate(version):
                self._gates[version] = self._task(self._gate(version))
            case machine.Mirror(version):
                self._observe(version)
                self._switch.is_mirrored = True
            case machine.Share(version, share):
                self._observe(version)
                self._switch.is_mirrored, self._switch.share = False, share
            case machine.Promote(version):
                self._promote(version)
            case machine.Retire(version):
                self._retire(version)
            case machine.Note(kind, version, reasons):
                if kind.endswith("_refused"):
                    self._last_refusal = reasons
                self._witness.note(kind, version=version, reasons=list(reasons))
            case machine.Deny(reason):
                raise ConfigError(reason)

    def _task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, version: int) -> None:
        event: machine.Event = machine.Loaded(version)
        try:
            source = await asyncio.to_thread(self._stock.source, version)
            release = await Release.open(
                source, self._pool, self._plan.num_replicas, self._plan.batching, self._witness
            )
            self._releases[version] = release
            self._witness.note("loaded", version=version, pids=release.pids, by_delta=release.held.by_delta)
        except (ShoalError, OSError) as error:
            event = machine.LoadFailed(version, str(error))
        except Exception as error:  # noqa: BLE001 - a fault of the service refuses a version, and it stays up
            _log.exception("version %d was not loaded, for a fault in the service", version)
            event = machine.LoadFailed(version, _told(error))
        finally:
            self._loading.pop(version, None)
        self._tell(event)

    async def _gate(self, version: int) -> None:
        release, switch, checks = self._releases[version], self._switch, list[Check]()
        try:
            checks, release.figures = await looked_at(release, switch.live, self._plan.policy, list(switch.recent))
        except Exception as error:  # noqa: BLE001 - as above
            _log.exception("version %d was not looked at, for a fault in the gate", version)
            checks = [Check("gate", False, _told(error))]
        finally:
            self._gates.pop(version, None)
        self._tell(machine.Gated(version, tuple(checks)))

    def _observe(self, version: int) -> None:
        """From here on, compare the candidate and the live version."""
        self._switch.candidate = self._releases[version]
        for release in (self._switch.candidate, self._switch.live):
            if release is not None:
                release.tally = Tally()

    def _promote(self, version: int) -> None:
        switch, release = self._switch, self._releases[version]
        release.standard = release.figures or release.standard
        if switch.live is not None:
            release.standard = release.standard or switch.live.standard  # it was promoted before it was measured
            self._before = observed(switch.live.tally)
            switch.others[switch.live.version] = switch.live
        switch.others.pop(version, None)
        release.tally = Tally()
        switch.live, switch.candidate, switch.share, switch.is_mirrored = release, None, 0.0, False

    def _retire(self, version: int) -> None:
        for under_way in (self._loading, self._gates):
            if version in under_way:
                under_way[version].cancel()
        if self._switch.candidate is not None and self._switch.candidate.version == version:
            self._switch.candidate, self._switch.share, self._switch.is_mirrored = None, 0.0, False
        self._switch.others.pop(version, None)
        release = self._releases.pop(version, None)
        if release is not None:
            self._task(release.close())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
