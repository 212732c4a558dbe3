"""The coordinator's process: carries out what the membership machine decides.

It holds nothing that is not in the run's store or in the workers: killed, it is started again, and the workers attach
to the new one. Imports neither torch nor a job's code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal import membership as m
from shoal.clock import Clock
from shoal.comm import messages as msg
from shoal.comm.link import Inbound, Listener
from shoal.errors import ConfigError
from shoal.events import Event, EventLog
from shoal.membership.balance import Hysteresis
from shoal.membership.detector import Detector
from shoal.tables.consistency import check_shards
from shoal.training.generations import Generations
from shoal.training.timing import Timing, exchange_of

_TICK_S = 0.02


class Coordinator:
    """One run's coordinator. ``serve`` returns when the run is over, with its outcome."""

    def __init__(
        self,
        listener: Listener[Any],
        generations: Generations,
        log: EventLog,
        record: dict[str, Any],
        clock: Clock,
    ) -> None:
        self._listener = listener
        self._generations = generations
        self._log = log
        self._clock = clock
        self._patience: dict[str, float] = record["job"]["patience"]
        self._record = record
        names = ("silent_s", "disconnected_s", "stuck_s")
        self._detector = Detector(*(self._patience[name] for name in names))
        self._balances, rules = _rules(record)
        stored = generations.newest_stored()
        self._state = replace(m.begin(rules, record["workers"], stored), generation=generations.newest_number())
        self._timing = Timing()
        self._identities: dict[str, msg.Identity] = {}
        self._figures: dict[str, dict[str, Any]] = {}
        self._drivers: set[str] = set()
        self._shards: dict[str, str] = {}
        self._tables: dict[str, dict[str, Any]] = {}
        self._strategy: dict[str, Any] = record["job"].get("strategy") or {}
        self._wanted_shards: int | None = None
        self._expelled: set[str] = set()
        self._dismissed: dict[str, msg.Dismissed] = {}
        self._deadline: tuple[float, str, int] | None = None
        self._stop_by_s: float | None = None
        self._replaces = False
        self._done_figures: dict[str, Any] = {}
        self._outcome: msg.Ended | None = None
        self.name = f"{clock.wall_s():.3f}"

    def take_over(self) -> None:
        """Replace a coordinator that died: go on from the newest recorded world, if there is one."""
        world = self._generations.newest()
        self.note("coordinator_replaced", generation=world.generation if world else 0)
        self._replaces = True
        if world is not None:
            self._state, actions = m.take_over(self._state, world)
            self._carry_out(actions)

    def serve(self) -> msg.Ended:
        """Run until the run is over."""
        while self._outcome is None:
            came, ended = self._listener.receive(_TICK_S)
            now_s = self._clock.monotonic_s()
            for inbound in came:
                self._handle(inbound, now_s)
            for worker in ended:
                self._detector.disconnected(worker, now_s)
            for worker, reason in self._detector.late(now_s).items():
                self._lose(worker, reason)
            self._check_deadlines(now_s)
            self._look_at_times(now_s)
        return self._outcome

    def note(self, kind: str, **fields: Any) -> None:
        self._write({"at_s": self._clock.wall_s(), "kind": kind, "source": "coordinator", **fields})

    def _write(self, event: Event) -> None:
        self._log.append(event)

    # Messages in

    def _handle(self, inbound: Inbound[Any], now_s: float) -> None:
        worker, message = inbound.peer, inbound.message
        if isinstance(message, msg.Watch | msg.Exited | msg.Scale | msg.Stop | msg.Ask):
            self._handle_command(worker, message)
        elif isinstance(message, msg.Hello | msg.Attach):
            self._introduce(worker, message, now_s)
        elif isinstance(message, msg.Note):
            if message.event.get("kind") == "tables":
                self._tables = message.event["shards"]
            self._write({"at_s": self._clock.wall_s(), "source": worker, **message.event})
        elif worker in self._dismissed:
            self._listener.send(worker, self._dismissed[worker])
        elif worker not in self._identities:
            self._listener.send(worker, msg.WhoAreYou(coordinator=self.name))
        else:
            self._detector.heard(worker, now_s)
            self._handle_worker(worker, message, now_s)

    def _introduce(self, worker: str, message: msg.Hello | msg.Attach, now_s: float) -> None:
        if worker in self._dismissed:
            self._listener.send(worker, self._dismissed[worker])
            return
        if self._strategy.get("shards") and not self._shards:
            return  # it will say so again
        refusal = self._refusal(message.identity)
        if refusal:
            self.note("refused", worker=worker, reason=refusal)
            self._listener.send(worker, msg.Dismissed(reason=refusal, expelled=True))
            return
        first = worker not in self._identities
        self._identities[worker] = message.identity
        self._detector.heard(worker, now_s)
        if isinstance(message, msg.Hello):
            peers = {w: self._identities[w].transfer_address for w in self._state.members if w in self._identities}
            self._listener.send(worker, msg.Welcome(coordinator=self.name, peers=peers))
            if first:
                self.note("joined", worker=worker, host=message.identity.host, pid=message.identity.pid)
            self._apply(m.Joined(worker, frozenset(message.unreachable)))
        else:
            if first:
                self.note("attached", worker=worker, generation=message.generation, pid=message.identity.pid)
            self._apply(m.Attached(worker, message.generation, message.standing, message.halted))

    def _refusal(self, identity: msg.Identity) -> str:
        """Why a process may not take part, or nothing."""
        wanted = self._record["identity"]
        pairs = {
            "protocol": (msg.PROTOCOL, identity.protocol),
            "shoal": (wanted["shoal"], identity.shoal),
            "torch": (wanted["torch"], identity.torch),
            "job code": (wanted["job_hash"], identity.job_hash),
        }
        wrong = [f"{name} {came} instead of {need}" for name, (need, came) in pairs.items() if need != came]
        return f"it runs {', '.join(wrong)}; install the same revision and start it again" if wrong else ""

    def _handle_worker(self, worker: str, message: Any, now_s: float) -> None:
        match message:
            case msg.Beat():
                self._detector.heard(worker, now_s, message.phase, message.phase_s)
                self._figures[worker] = {
                    "step": message.step, "stable_step": message.stable_step, "phase": message.phase,
                    "generation": message.generation, **message.figures,
                }  # fmt: skip
            case msg.Report():
                self.note("reported", worker=worker, generation=message.generation, step=message.standing.step,
                          fingerprint=message.standing.fingerprint, reason=message.reason)  # fmt: skip
                cut = frozenset(message.unreachable)
                self._apply(m.Reported(worker, message.generation, message.standing, cut))
            case msg.Caught():
                self.note("healed", worker=worker, generation=message.generation, step=message.step)
                self._apply(m.Healed(worker, message.generation))
            case msg.Taken():
                self._apply(m.DealTaken(message.generation, message.number))
            case msg.Leave():
                self.note("leave_asked", worker=worker)
                self._apply(m.LeaveAsked(worker))
            case msg.Saved():
                self.note("stored", step=message.standing.step, fingerprint=message.standing.fingerprint)
                self._apply(m.Stored(message.standing))
            case msg.Done():
                self._done_figures = message.figures or self._done_figures
                if message.stored:
                    self._apply(m.Stored(message.standing))
                if message.stored and self._stop_by_s is not None:
                    reason = f"it was asked to stop; step {message.standing.step} is stored"
                    self._end(msg.Ended(outcome="stopped", reason=reason))
                self._apply(m.Finished(worker, message.generation, message.standing))
            case msg.Meet():
                for member in self._state.members:
                    if member != worker and message.generation == self._state.generation:
                        self._listener.send(member, message)
            case msg.Failed():
                self._end(msg.Ended(outcome="failed", reason=message.reason, kind=message.kind))

    def _handle_command(self, peer: str, message: Any) -> None:
        match message:
            case msg.Watch():
                self._drivers.add(peer)
                self._learn_of_shards(message.shards)
                if self._replaces:
                    self._replaces = False
                    self._learn_from_driver(message)
                self._tell_drivers()
            case msg.Exited():
                self._lose(message.worker, message.reason)
            case msg.Scale():
                reason = self._why_not(message)
                if not reason:
                    self._scale(message)
                self._listener.send(peer, msg.Answer(ok=not reason, reason=reason))
            case msg.Stop():
                self._stop(message.reason)
                self._listener.send(peer, msg.Answer(ok=True))
            case msg.Ask():
                self._listener.send(peer, msg.Answer(ok=True, status=self.status(), record=self._record))

    def _why_not(self, asked: msg.Scale) -> str:
        """What speaks against a number of workers or shards, or nothing."""
        rules = self._state.rules
        if asked.target is not None and not rules.min_workers <= asked.target <= rules.max_workers:
            return f"this run takes {rules.min_workers} to {rules.max_workers} workers"
        if asked.shards is not None:
            if not self._strategy.get("shards"):
                return "this run has no table shards: its strategy is neither Hybrid nor ParameterServer"
            try:
                check_shards(asked.shards, self._strategy["durability"])
            except ConfigError as error:
                return str(error)
        return ""

    def _scale(self, asked: msg.Scale) -> None:
        if asked.shards is not None:
            self.note("shards_scaled", shards=asked.shards)
            self._wanted_shards = asked.shards
        if asked.target is not None:
            self.note("scaled", target=asked.target)
            self._apply(m.Scaled(asked.target))
        self._tell_drivers()

    def _learn_of_shards(self, shards: dict[str, str]) -> None:
        """One that is found elsewhere now is told of with the next generation, so that one has to begin."""
        if not shards:  # one of them is being started
            return
        moved = [name for name, address in shards.items() if self._shards.get(name, address) != address]
        self._shards = shards
        if moved:
            self.note("shards_moved", shards={name: shards[name] for name in moved})
            self._apply(m.Stalled(self._state.generation))

    def _learn_from_driver(self, watch: msg.Watch) -> None:
        """What the coordinator that we replace was told, and only the driver still knows."""
        if watch.target != self._state.target:
            self._apply(m.Scaled(watch.target))
        if watch.stopping:
            self._stop("it was asked to stop")

    def _stop(self, reason: str) -> None:
        """Let the members store where they stand; with none, end at once."""
        if self._stop_by_s is not None:
            return
        self.note("stop_asked", reason=reason)
        self._stop_by_s = self._clock.monotonic_s() + self._patience["stuck_s"]
        self._tell_drivers()
        if not self._state.members:
            self._end(msg.Ended(outcome="stopped", reason=reason))
        self._send(self._state.members, msg.Conclude(generation=self._state.generation))

    # Deciding and doing

    def _lose(self, worker: str, reason: str) -> None:
        self._detector.forget(worker)
        if worker in self._state.present:
            self.note("lost", worker=worker, reason=reason)
            if norm := self._figures.get(worker, {}).get("residual_norm"):
                self.note("residual_dropped", worker=worker, norm=norm, reason="only the lost worker had it")
            self._apply(m.Lost(worker, reason))

    def _check_deadlines(self, now_s: float) -> None:
        members = self._state.members
        if self._detector.stalled(members, self._patience["collective_s"], now_s):
            self.note("stalled", generation=self._state.generation)
            for member in members:
                self._detector.heard(member, now_s, "halt")
            self._apply(m.Stalled(self._state.generation))
        if self._stop_by_s is not None and now_s > self._stop_by_s:
            self._end(msg.Ended(outcome="stopped", reason="it was asked to stop, and no version was stored in time"))
        if self._deadline is not None and now_s > self._deadline[0]:
            _, phase, generation = self._deadline
            self._deadline = None
            self._apply(m.DeadlinePassed(phase, generation))

    def _look_at_times(self, now_s: float) -> None:
        """Tell the machine and the log what a step costs the members."""
        if self._balances and self._stop_by_s is None:
            measured = self._timing.measured(self._state, self._figures, now_s)
            if measured is not None:
                self._apply(measured)
        self._tell_times(now_s)

    def _tell_times(self, now_s: float, *, last: bool = False) -> None:
        told, step = self._timing.told(self._state, self._figures, now_s, last=last), self._newest_step()
        if told:
            exchange = exchange_of(self._record)
            self.note("timing", generation=self._state.generation, step=step, strategy=exchange["strategy"],
                      codec=exchange["codec"], workers=told)  # fmt: skip

    def _apply(self, event: m.Event) -> None:
        state, actions = m.step(self._state, event)
        if any(isinstance(action, m.Announce) for action in actions) and self._learn_of_stored():
            state, actions = m.step(self._state, event)
        self._state = state
        self._carry_out(actions)

    def _learn_of_stored(self) -> bool:
        """Before a world is announced: a version whose writer died before it could tell us must not be forgotten."""
        stored = self._generations.newest_stored()
        if stored <= self._state.stored:
            return False
        self._state, actions = m.step(self._state, m.Stored(stored))
        self._carry_out(actions)
        return True

    def _carry_out(self, actions: list[m.Action]) -> None:
        for action in actions:
            match action:
                case m.Announce():
                    self._announce(action.world)
                case m.Halt():
                    self.note("halt", generation=action.generation, at_boundary=action.at_boundary)
                    pause = msg.Pause(
                        generation=action.generation, at_boundary=action.at_boundary, probe=action.probe,
                        leaving=action.leaving,
                    )  # fmt: skip
                    self._send(action.members, pause)
                case m.Redeal():
                    deal = msg.Deal(generation=action.generation, number=action.number, lanes=action.lanes)
                    self.note("deal", generation=action.generation, lanes=_counts(action.lanes), reason=action.reason)
                    self._send(action.members, deal)
                case m.Dismiss():
                    self._dismiss(action)
                case m.Await():
                    wait_s = self._patience["gather_s" if action.phase == m.Phase.GATHERING else "stuck_s"]
                    if action.phase == m.Phase.ATTACHING:
                        wait_s = self._patience["silent_s"]
                    self._deadline = (self._clock.monotonic_s() + wait_s, action.phase, action.generation)
                case m.End():
                    self._end(msg.Ended(outcome="done", reason="every step is committed and stored"))

    def _announce(self, world: m.World) -> None:
        """Record the world under its number, then tell its members; another coordinator's record ends this one."""
        if not self._generations.record(world):
            reason = f"another coordinator has already begun generation {world.generation} of this run"
            self._end(msg.Ended(outcome="replaced", reason=reason))
            return
        self.note(
            "generation", generation=world.generation, members=list(world.members), origin=world.origin,
            base_step=world.base.step, fingerprint=world.base.fingerprint, lanes=_counts(world.lanes),
            healing=sorted(world.sources),
        )  # fmt: skip
        addresses = {w: self._identities[w].transfer_address for w in world.members}
        self._send(world.members, msg.Enter(world=world, addresses=addresses, shards=self._shards))
        if self._stop_by_s is not None:
            self._send(world.members, msg.Conclude(generation=world.generation))

    def _dismiss(self, action: m.Dismiss) -> None:
        self.note("dismissed", worker=action.worker, reason=action.reason, expelled=action.expelled)
        dismissed = msg.Dismissed(reason=action.reason, expelled=action.expelled)
        self._dismissed[action.worker] = dismissed
        self._listener.send(action.worker, dismissed)
        self._detector.forget(action.worker)
        self._identities.pop(action.worker, None)
        self._figures.pop(action.worker, None)
        if action.expelled:
            self._expelled.add(action.worker)
            self._tell_drivers()

    def _send(self, members: tuple[str, ...], message: object) -> None:
        for member in members:
            self._listener.send(member, message)

    def _tell_drivers(self) -> None:
        wanted = msg.Wanted(
            target=self._state.target,
            expelled=sorted(self._expelled),
            stopping=self._stop_by_s is not None,
            shards=self._wanted_shards,
        )
        self._send(tuple(self._drivers), wanted)

    def _end(self, ended: msg.Ended) -> None:
        if self._outcome is None:
            self._tell_times(self._clock.monotonic_s(), last=True)
            self.note("ended", outcome=ended.outcome, reason=ended.reason, figures=self._done_figures)
            self._outcome = ended
            self._send((*self._identities, *self._drivers), ended)

    def _newest_step(self) -> int:
        return max(0, self._state.stored.step, *(int(figures["step"]) for figures in self._figures.values()))

    def status(self) -> dict[str, Any]:
        """How the run stands, for people and programs."""
        state = self._state
        return {
            "phase": str(state.phase),
            "generation": state.generation,
            "target": state.target,
            "workers": [
                {"name": w, "host": self._identities[w].host, "pid": self._identities[w].pid,
                 "rank": state.members.index(w) if w in state.members else None,
                 "lanes": len(state.world.lanes.get(w, ())) if state.world else 0,
                 **self._figures.get(w, {})}
                for w in (*state.members, *sorted(set(state.pool) - set(state.members))) if w in self._identities
            ],
            "step": self._newest_step(),
            "total_steps": state.rules.total_steps,
            "stored_step": state.stored.step,
            "strangers_refused": self._listener.num_refused,
            "shards": self._tables,
        }  # fmt: skip


def _num_gpus(record: dict[str, Any]) -> int:
    """How many GPUs this machine has for its workers, if each on it wants one; else 0."""
    return int(record.get("num_gpus", 0)) if record.get("on") == "local" else 0


def _rules(record: dict[str, Any]) -> tuple[bool, m.Rules]:
    """Whether lanes move for balance, and what the run asks of its membership. Older records say nothing of balance."""
    balance: dict[str, Any] = record["job"].get("balance") or {"enabled": False}
    names = ("least_gain", "settle_s")
    return balance["enabled"], m.Rules(
        num_lanes=record["job"]["num_lanes"],
        min_workers=record["min_workers"],
        max_workers=min(record["max_workers"], _num_gpus(record) or record["max_workers"]),
        total_steps=record["total_steps"],
        hysteresis=Hysteresis(**{name: balance[name] for name in names if name in balance}),
        in_rounds="sync_every_steps" in record["job"].get("strategy", {}),
    )


def _counts(lanes: m.Lanes) -> dict[str, int]:
    return {worker: len(own) for worker, own in lanes.items()}
