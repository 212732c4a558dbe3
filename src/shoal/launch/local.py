"""Workers as child processes on this machine, forked by a nursery that has the job loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import Bug, ShoalError
from shoal.launch.fleet import Gone, Place
from shoal.launch.nursery import Command, Lines, Nursery, Start, first_answer, gpu_for
from shoal.training.folder import RunFolder


class LocalFleet:
    """Starts a worker in about 50 ms. ``about`` is what the nursery says of the job once it has loaded and tried it."""

    def __init__(self, pid: int, commands: int, answers: int, num_threads: int | None = None) -> None:
        self.host = "127.0.0.1"
        self.wake_fd: int | None = answers
        self._pid = pid
        self._closed = False
        self._num_threads = num_threads
        self._commands = commands
        self._lines = Lines(answers)
        self._gone: list[Gone] = []
        self._folder: RunFolder | None = None
        self.pids: dict[str, int] = {}
        self._gpus: dict[str, int | None] = {}
        try:
            self.about = self._first_answer()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def of_file(path: Path, settings: Sequence[str]) -> LocalFleet:
        """A nursery of its own for a job file."""
        command = [sys.executable, "-m", "shoal.launch.nursery", str(path), *settings]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=False)
        assert child.stdin is not None and child.stdout is not None
        fleet = LocalFleet(child.pid, os.dup(child.stdin.fileno()), os.dup(child.stdout.fileno()))
        child.stdin.close()
        child.stdout.close()
        child.returncode = 0
        return fleet

    @staticmethod
    def of_value(load: Callable[[], tuple[Any, dict[str, Any]]]) -> LocalFleet:
        """A fork of this process as the nursery, for a job that is no file, as in a notebook.

        Its workers have one thread each: once a process has computed with several, a fork of it that does hangs.
        """
        commands, to_nursery = os.pipe()
        from_nursery, answers = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(to_nursery)
                os.close(from_nursery)
                Nursery(commands, answers, load).serve()
            finally:
                os._exit(0)
        os.close(commands)
        os.close(answers)
        return LocalFleet(pid, to_nursery, from_nursery, num_threads=1)

    def _first_answer(self) -> dict[str, Any]:
        lines: list[bytes] | None = []
        while not lines:
            lines = self._lines.read()
            if lines is None:
                return first_answer({"ended": "the process that was to load the job has ended"})
        return first_answer(msgspec.json.decode(lines[0]))

    def settle(self, folder: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Where the run is that workers are started for."""
        self._folder, self._record = folder, record

    def places(self) -> list[Place]:
        return [Place(self.host)]

    def start(self, name: str, address: str) -> None:
        if self._folder is None:
            raise Bug("settle the fleet before workers are started")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._gpus[name] = gpu_for(self.about, self._gpus.values())
        start = Start(
            name=name,
            address=address,
            key_path=str(self._folder.key_path),
            store=self._record["store"],
            job_hash=self._record["identity"]["job_hash"],
            host=self.host,
            log=str(self._folder.log_path(name)),
            num_threads=self._num_threads or max(1, cores // self._record["workers"]),
            gpu=self._gpus[name],
        )
        self._say(Command(start=start))

    def kill(self, name: str) -> None:
        self._say(Command(kill=name))

    def _say(self, command: Command) -> None:
        try:
            os.write(self._commands, msgspec.json.encode(command) + b"\n")
        except BrokenPipeError:
            raise ShoalError("the process that starts workers has ended") from None

    def gone(self) -> list[Gone]:
        os.set_blocking(self._lines.fd, False)
        try:
            lines = self._lines.read()
        except BlockingIOError:
            return []
        if lines is None:
            raise ShoalError("the process that starts workers has ended")
        gone = []
        for answer in map(msgspec.json.decode, lines):
            if "started" in answer:
                self.pids[answer["started"]] = answer["pid"]
            if "exited" in answer:
                self.pids.pop(answer["exited"], None)
                self._gpus.pop(answer["exited"], None)
                gone.append(Gone(answer["exited"], answer["reason"]))
        return gone

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self._commands, self._lines.fd):
            os.close(fd)
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            return
