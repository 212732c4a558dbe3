"""The driver: keeps a run's coordinator alive and as many workers as it wants, and shows how it goes."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.comm import messages as msg
from shoal.comm.keys import JobKey
from shoal.comm.link import Link
from shoal.errors import ConfigError, ShoalError
from shoal.events import read_events
from shoal.launch.fleet import Fleet
from shoal.launch.progress import Progress
from shoal.launch.shards import ShardCrew, num_shards
from shoal.training.folder import RunFolder
from shoal.training.generations import Generations
from shoal.versions.store import Store

_TICK_S = 0.02
_ASK_S = 0.25
_START_S = 30.0
_GRACE_S = 60.0
_COORDINATOR_SILENT_S = 5.0
_BREATH_S = 0.3
"""A replacement is started this long after a loss: first the others redo their step, with the machine to themselves."""
_MOST_FAILURES = 5


class Stopping(BaseException):
    """The person or system that started the driver asks it to end: Ctrl-C, or SIGTERM. Carries the exit code."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


@dataclass
class _Crew:
    """The workers that the driver has started and not seen end."""

    started_at_s: dict[str, float] = field(default_factory=dict)
    doomed: set[str] = field(default_factory=set)
    start_from_s: float = 0.0
    num_started: int = 0
    num_failures: int = 0
    """Since ``step`` was committed."""
    step: int = 0


class CoordinatorProcess:
    """The coordinator as a child process; ``revive`` starts another in its place, at the same address."""

    def __init__(self, folder: RunFolder, host: str, port: int) -> None:
        self._folder = folder
        self._host = host
        self._child = self._start(port, replace=False)
        self.address = self._wait_for_address()

    def _start(self, port: int, *, replace: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shoal.launch.coordinate", str(self._folder.path)]
        command += ["--host", self._host, "--port", str(port), *(["--replace"] if replace else [])]
        log = self._folder.log_path("coordinator")
        with log.open("ab") as output:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)

    def _wait_for_address(self) -> str:
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            if self._child.poll() is not None:
                raise ConfigError(_last_line(self._folder.log_path("coordinator")))
            try:
                control = self._folder.read_control()
            except ConfigError:
                time.sleep(_TICK_S)
                continue
            if control.pid == self._child.pid:
                return control.address
            time.sleep(_TICK_S)
        raise ShoalError(f"the coordinator did not start within {_START_S:g} s; see {self._folder.path}/logs")

    def is_up(self) -> bool:
        """Whether it has said where it listens."""
        try:
            return self._folder.read_control().pid == self._child.pid
        except ConfigError:
            return False

    def end(self) -> None:
        """Kill one that is frozen; ``revive`` then starts another."""
        self._child.kill()
        self._child.wait()

    def revive(self) -> bool:
        """Start another if this one has ended; whether it had."""
        if self._child.poll() is None:
            return False
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child = self._start(int(self.address.rsplit(":", 1)[1]), replace=True)
        return True

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "the coordinator ended without a word"


class Driver:
    """``run`` returns when the run is over."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], fleet: Fleet, progress: Progress) -> None:
        self._folder = folder
        self._fleet = fleet
        self._progress = progress
        self._target: int = record["workers"]
        self._crew = _Crew(num_started=record.get("num_started", 0))
        self._ended: msg.Ended | None = None
        self._exit_code: int | None = None
        self._stopping = False
        self._asked_at_s = -1.0
        self._heard_at_s = time.monotonic()
        self._is_starting = False
        self._has_told_shards = False
        self._offset = folder.events_path.stat().st_size if folder.events_path.exists() else 0
        host, _, port = str(record.get("listen") or f"{fleet.host}:0").rpartition(":")
        self._coordinator = CoordinatorProcess(folder, host, int(port))
        key = JobKey.read(folder.key_path)
        self._link: Link[Any] = Link(self._coordinator.address, key, "driver", msg.ToDriver)  # type: ignore[arg-type]
        self._shards = self._crew_of_shards(record) if num_shards(record) else None

    def _crew_of_shards(self, record: dict[str, Any]) -> ShardCrew:
        since = Generations(Store(record["store"])).newest_stored().step
        return ShardCrew(self._folder, record, self._fleet.places(), since)

    def run(self) -> tuple[msg.Ended, int | None]:
        """The outcome, and the exit code of who stopped it, if someone did."""
        try:
            while self._ended is None:
                try:
                    self._tick()
                except (KeyboardInterrupt, Stopping) as stopping:
                    self._stop(getattr(stopping, "exit_code", 130))
            self._wait_for_workers()
        finally:
            self._progress.close()
            self._link.close()
            self._fleet.close()
            if self._shards is not None:
                self._shards.close()
            self._coordinator.close()
        return self._ended, self._exit_code

    def _stop(self, exit_code: int) -> None:
        """The first time: store, then end. The second time: end."""
        if self._exit_code is not None:
            self._ended = msg.Ended(outcome="stopped", reason="it was stopped at once, at the newest stored version")
            return
        self._exit_code = exit_code
        self._stopping = True
        self._progress.say("stopping: the workers store where they stand (once more to end at once)")
        self._link.send(msg.Stop(reason="it was asked to stop"))

    def _tick(self) -> None:
        now_s = time.monotonic()
        if self._shards is not None:
            self._look_after(self._shards)
        if now_s - self._asked_at_s > _ASK_S:
            self._asked_at_s = now_s
            self._link.send(msg.Watch(target=self._target, stopping=self._stopping, shards=self._addresses or {}))
            self._link.send(msg.Ask())
            self._follow()
        for message in self._link.receive(_TICK_S, self._fleet.wake_fd):
            self._heard_at_s = time.monotonic()
            self._hear(message)
        if self._is_starting and self._coordinator.is_up():
            self._is_starting, self._heard_at_s = False, time.monotonic()
        patience_s = _START_S if self._is_starting else _COORDINATOR_SILENT_S
        if time.monotonic() - self._heard_at_s > patience_s:
            self._heard_at_s = time.monotonic()
            self._coordinator.end()
        for gone in self._fleet.gone():
            self._lose(gone.name, gone.reason)
        if self._ended is None and self._coordinator.revive():
            self._is_starting = True
            self._progress.say("the coordinator had ended; another has taken its place")
        while self._ended is None and len(self._crew.started_at_s) < self._target and self._may_start():
            self._start_worker(now_s)

    @property
    def _addresses(self) -> dict[str, str] | None:
        return self._shards.addresses if self._shards is not None else None

    def _look_after(self, shards: ShardCrew) -> None:
        try:
            for line in shards.look():
                self._progress.say(line)
        except ShoalError as error:
            self._ended = msg.Ended(outcome="failed", reason=str(error), kind="Fault")
        if not self._has_told_shards and self._addresses is not None:
            self._has_told_shards, self._asked_at_s = True, -1.0

    def _hear(self, message: Any) -> None:
        match message:
            case msg.Wanted():
                self._target, self._stopping = message.target, self._stopping or message.stopping
                if self._shards is not None and message.shards is not None:
                    self._shards.want(message.shards)
                for name in set(message.expelled) & set(self._crew.started_at_s) - self._crew.doomed:
                    self._crew.doomed.add(name)
                    self._fleet.kill(name)
            case msg.Answer(ok=True) if message.status:
                self._progress.update(message.status)
                if message.status["step"] > self._crew.step:
                    self._crew.step, self._crew.num_failures = message.status["step"], 0
            case msg.Ended():
                self._ended = message

    def _lose(self, name: str, reason: str) -> None:
        if self._crew.started_at_s.pop(name, None) is None:
            return
        self._link.send(msg.Exited(worker=name, reason=reason))
        self._crew.start_from_s = time.monotonic() + _BREATH_S
        if reason in ("exited with 1", "exited with 2"):
            self._crew.num_failures += 1
        if self._crew.num_failures >= _MOST_FAILURES and self._ended is None:
            log = self._folder.log_path(name)
            last = f"{_MOST_FAILURES} workers failed while no step was committed; {log} ends: {_last_line(log)}"
            self._ended = msg.Ended(outcome="failed", reason=last, kind="Fault")

    def _may_start(self) -> bool:
        if self._shards is not None and not self._has_told_shards:
            return False
        return not self._crew.started_at_s or time.monotonic() >= self._crew.start_from_s

    def _start_worker(self, now_s: float) -> None:
        name = f"w{self._crew.num_started}"
        self._crew.num_started += 1
        self._crew.started_at_s[name] = now_s
        self._fleet.start(name, self._coordinator.address)

    def _follow(self) -> None:
        events, self._offset = read_events(self._folder.events_path, self._offset)
        for event in events:
            self._progress.event(event)
            if self._shards is not None and event["kind"] == "stored":
                self._shards.stored(event["step"])
            if self._shards is not None and event["kind"] == "tables":
                self._shards.begun()

    def _wait_for_workers(self) -> None:
        """The leader may still be writing its last version. Who had not joined yet will not hear of the end."""
        joined = {e["worker"] for e in read_events(self._folder.events_path)[0] if e["kind"] == "joined"}
        for name in set(self._crew.started_at_s) - joined:
            self._fleet.kill(name)
            del self._crew.started_at_s[name]
        deadline_s = time.monotonic() + _GRACE_S
        while self._crew.started_at_s and time.monotonic() < deadline_s and self._exit_code is None:
            for gone in self._fleet.gone():
                self._crew.started_at_s.pop(gone.name, None)
            time.sleep(_TICK_S)
        self._follow()
