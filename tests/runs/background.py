"""A run in processes of its own, to be watched, steered and killed from a test."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def until(self, kind: str, **fields: Any) -> Event:
        """Wait for an event; a field that is a number is met by any that is as large."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            for event in self.events:
                if event["kind"] == kind and all(_meets(event[name], wanted) for name, wanted in fields.items()):
                    return event
            time.sleep(_POLL_S)
        raise AssertionError(f"no {kind} {fields} within {_PATIENCE_S:g} s")

    def until_step(self, step: int) -> None:
        self.until("progress", step=step)

    def processes(self) -> list[int]:
        """Everything alive in the driver's session."""
        return [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _session(stat) == self.pid]

    def wait(self) -> int:
        """The driver's exit code, negative for a signal, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_everything(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.wait()


def _meets(came: Any, wanted: Any) -> bool:
    return bool(came >= wanted if isinstance(wanted, int | float) else came == wanted)


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
    """``call`` drives the run ``name``. What is left of it at the end is killed."""
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
        call()
    except shoal.ShoalError as error:
        return error.exit_code
    return 0
