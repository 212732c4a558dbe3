"""Process trees that end whole: every process is found by a mark in its environment, whoever its parent is by now."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

MARK = "BENCHMARK_TREE"
POLITE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program of a peer. One that is ``revived`` is started again whenever it ends but with 0."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    revived: bool = False


class Tree:
    """Programs and all that they start, as a context; leaving it ends every one of them, by its id. Linux only."""

    def __init__(self, commands: Sequence[Command], output: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._output = output
        self._running = [(command, self._start(command)) for command in commands]

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def revive(self) -> None:
        """Start again what is to be started again."""
        self._running = [
            (command, self._start(command) if command.revived and process.poll() else process)
            for command, process in self._running
        ]

    def failed(self) -> bool:
        """Whether a program that is not revived has ended but with 0."""
        return any(process.poll() for command, process in self._running if not command.revived)

    def end(self) -> None:
        """Ask politely, wait a little, then kill -9 what is left."""
        for _, process in self._running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + POLITE_S
        while self.pids() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.05)
        while left := self.pids():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.01)
        self._reap()

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        with self._output.open("ab") as output:
            return subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _reap(self) -> None:
        for _, process in self._running:
            process.poll()

    def pids(self) -> list[int]:
        """All that run now."""
        marked = f"{MARK}={self._mark}".encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if marked in _environment(pid)]


def _environment(pid: int) -> list[bytes]:
    """Empty for a process that is gone, a zombie, or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
