"""Faults as data: what is to befall a run, and when; and a thread that sees to it, by following the run's event log."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shoal.comm import messages as msg
from shoal.errors import ShoalError
from shoal.events import Event, read_events
from shoal.training.commanding import command
from shoal.training.folder import RunFolder

Kind = Literal[
    "kill", "freeze", "leave", "kill_coordinator", "freeze_coordinator", "kill_healing", "scale", "kill_shard",
    "freeze_shard", "lose_shard", "scale_shards",
]  # fmt: skip

_POLL_S = 0.002


@dataclass(frozen=True)
class Fault:
    """``kill`` and ``freeze`` (SIGKILL, SIGSTOP) a member by its rank; ``leave``: SIGTERM to it; ``kill_healing``: the
    first worker that is catching up, as soon as there is one; ``scale`` to ``workers``, ``scale_shards`` to ``shards``;
    ``kill_shard`` and ``freeze_shard``: the table shard of number ``rank``; ``lose_shard``: it and its folder. Due once
    step ``at_step`` is committed."""

    kind: Kind
    at_step: int
    rank: int = 0
    workers: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Inflicted:
    """A fault that was carried out: on whom, and when (seconds since 1970)."""

    fault: Fault
    worker: str
    at_s: float


@dataclass(frozen=True)
class FaultPlan:
    """Faults in the order of their steps. A value: each method returns a plan with one more.

    The run's job should say ``log_every_steps=1``, for steps are known from its log.
    """

    faults: tuple[Fault, ...] = ()

    def kill(self, *, at_step: int, rank: int = 0) -> FaultPlan:
        return self.add(Fault("kill", at_step, rank))

    def freeze(self, *, at_step: int, rank: int = 0) -> FaultPlan:
        return self.add(Fault("freeze", at_step, rank))

    def leave(self, *, at_step: int, rank: int = 0) -> FaultPlan:
        return self.add(Fault("leave", at_step, rank))

    def kill_coordinator(self, *, at_step: int) -> FaultPlan:
        return self.add(Fault("kill_coordinator", at_step))

    def freeze_coordinator(self, *, at_step: int) -> FaultPlan:
        return self.add(Fault("freeze_coordinator", at_step))

    def kill_shard(self, *, at_step: int, number: int = 0) -> FaultPlan:
        return self.add(Fault("kill_shard", at_step, number))

    def freeze_shard(self, *, at_step: int, number: int = 0) -> FaultPlan:
        return self.add(Fault("freeze_shard", at_step, number))

    def lose_shard(self, *, at_step: int, number: int = 0) -> FaultPlan:
        return self.add(Fault("lose_shard", at_step, number))

    def scale_shards(self, shards: int, *, at_step: int) -> FaultPlan:
        return self.add(Fault("scale_shards", at_step, shards=shards))

    def scale(self, workers: int, *, at_step: int) -> FaultPlan:
        return self.add(Fault("scale", at_step, workers=workers))

    def add(self, fault: Fault) -> FaultPlan:
        return replace(self, faults=tuple(sorted((*self.faults, fault), key=lambda f: f.at_step)))

    @contextmanager
    def befalling(self, folder: RunFolder) -> Iterator[list[Inflicted]]:
        """Carry the plan out on the run in ``folder``, which may not exist yet, while the context lasts."""
        hand = _Hand(self, folder)
        hand.start()
        try:
            yield hand.inflicted
        finally:
            hand.stop()


@dataclass
class _View:
    """What the event log tells: who is in, who heals, how far it is."""

    members: list[str] = field(default_factory=list)
    healing: set[str] = field(default_factory=set)
    pids: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    step: int = 0

    def take(self, event: Event) -> None:
        match event["kind"]:
            case "joined" | "attached":
                self.pids[event["worker"]] = event["pid"]
            case "generation":
                self.members, self.healing = list(event["members"]), set(event["healing"])
            case "healed":
                self.healing.discard(event["worker"])
            case "lost" | "dismissed":
                self.members = [m for m in self.members if m != event["worker"]]
            case "tables":
                self.shards = {name: figures["pid"] for name, figures in event["shards"].items()}
            case "progress":
                self.step = max(self.step, event["step"])


class _Hand:
    def __init__(self, plan: FaultPlan, folder: RunFolder) -> None:
        self.inflicted: list[Inflicted] = []
        self._left = list(plan.faults)
        self._folder = folder
        self._frozen: list[int] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-faults", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for pid in self._frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run(self) -> None:
        view, offset = _View(), 0
        while not self._stopping.is_set() and self._left:
            events, offset = read_events(self._folder.events_path, offset)
            for event in events:
                view.take(event)
            if view.step >= self._left[0].at_step and view.members:
                fault = self._left[0]
                victim = self._strike(fault, view)
                if victim is not None:
                    self._left.pop(0)
                    self.inflicted.append(Inflicted(fault, victim, time.time()))
            time.sleep(_POLL_S)

    def _strike(self, fault: Fault, view: _View) -> str | None:
        """Carry one fault out; None if it cannot be yet."""
        if fault.kind in ("scale", "scale_shards"):
            try:
                command(self._folder, msg.Scale(target=fault.workers or None, shards=fault.shards or None))
            except ShoalError:
                return None
            return f"{fault.shards} shards" if fault.shards else f"{fault.workers} workers"
        if fault.kind in ("kill_coordinator", "freeze_coordinator"):
            frozen = fault.kind == "freeze_coordinator"
            os.kill(self._folder.read_control().pid, signal.SIGSTOP if frozen else signal.SIGKILL)
            return "coordinator"
        if fault.kind in ("kill_shard", "freeze_shard", "lose_shard"):
            return self._strike_shard(fault, view)
        victim = self._victim(fault, view)
        if victim is None:
            return None
        signals = {"kill": signal.SIGKILL, "kill_healing": signal.SIGKILL, "freeze": signal.SIGSTOP}
        with suppress(ProcessLookupError):
            os.kill(view.pids[victim], signals.get(fault.kind, signal.SIGTERM))
        if fault.kind == "freeze":
            self._frozen.append(view.pids[victim])
        return victim

    def _strike_shard(self, fault: Fault, view: _View) -> str | None:
        name = f"s{fault.rank}"
        if name not in view.shards:
            return None
        pid = view.shards.pop(name)
        with tempfile.TemporaryDirectory(dir=self._folder.path) as gone:
            if fault.kind == "lose_shard":  # at once: the next one is there in no time
                (self._folder.path / "shards" / name).rename(Path(gone) / name)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if fault.kind == "freeze_shard" else signal.SIGKILL)
        if fault.kind == "freeze_shard":
            self._frozen.append(pid)
        return name

    def _victim(self, fault: Fault, view: _View) -> str | None:
        if fault.kind == "kill_healing":
            return min(view.healing & set(view.members), default=None)
        return view.members[fault.rank % len(view.members)]
