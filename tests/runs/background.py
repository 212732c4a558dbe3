"""A run in processes of its own, to be watched, steered and killed from a test."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shoal
from shoal.events import Event, read_events
from shoal.launch.run import runs_folder

_PATIENCE_S = 60.0
_POLL_S = 0.01


@dataclass
class Background:
    """A driver that was forked into a session of its own, with all that it starts."""

    pid: int
    path: Path

    @property
    def events(self) -> list[Event]:
        return read_events(self.path / "events.jsonl")[0]

    def until(self, kind: str, step: int = 0) -> Event:
        """The first event of a kind, at ``step`` or later, once there is one."""

        def found() -> Event | None:
            return next((e for e in self.events if e["kind"] == kind and e.get("step", 0) >= step), None)

        return self._awaited(found, f"{kind} at step {step}")

    def until_step(self, step: int) -> None:
        self.until("progress", step)

    def until_listening(self) -> None:
        """Until the coordinator can be called."""
        self._awaited((self.path / "control.json").exists, "coordinator")

    def _awaited(self, look: Callable[[], Any], what: str) -> Any:
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found := look():
                return found
            assert ended is None, f"the process has ended without a {what}"
            time.sleep(_POLL_S)
        raise AssertionError(f"no {what} within {_PATIENCE_S:g} s")

    def processes(self) -> list[int]:
        """Everything alive in the driver's session."""
        return [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _session(stat) == self.pid]

    def wait(self) -> int:
        """The driver's exit code, negative for a signal, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_everything(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):  # one may end by the death of another
                os.kill(pid, signal.SIGKILL)
        self.wait()


def _session(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def who_outlives(pids: list[int], timeout_s: float) -> list[int]:
    """Those of ``pids`` that have not ended after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    alive = []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([handle], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            alive.append(pid)
        os.close(handle)
    return alive


@contextmanager
def in_background(call: Callable[[], object], name: str) -> Iterator[Background]:
    """``call`` drives the run ``name``, or is a worker of it. What is left of it at the end is killed."""
    pid = os.fork()
    if pid == 0:
        os._exit(_driver(call))
    run = Background(pid, runs_folder() / name)
    try:
        yield run
    finally:
        for left in run.processes():
            os.kill(left, signal.SIGKILL)


def _driver(call: Callable[[], object]) -> int:
    os.setsid()
    try:
        returned = call()
    except shoal.ShoalError as error:
        return error.exit_code
    except SystemExit as end:
        return int(end.code or 0)
    return returned if isinstance(returned, int) else 0
