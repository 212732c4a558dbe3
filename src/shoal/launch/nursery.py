"""A process that has the job loaded, and forks a worker from itself whenever one is wanted: in milliseconds.

It has one thread and makes no use of torch, so that a fork of it is sound. It speaks JSON lines: ``{"start": {...}}``
and ``{"kill": name}`` in; ``{"ready": {...}}``, ``{"refused": {...}}``, ``{"started": name, "pid": number}`` and
``{"exited": name, "reason": text, "code": number}`` out. Its workers end when it does, and it ends when its input does.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec

from shoal.errors import ConfigError, ShoalError


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A worker to fork. ``log``: where its output goes; ``num_threads``: torch's, unless the job says; ``gpu``: which
    of those that are visible here is its own."""

    name: str
    address: str
    key_path: str
    store: str
    job_hash: str
    host: str
    log: str
    num_threads: int
    gpu: int | None = None


class Command(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line to the nursery: a worker to start, or the name of one to kill."""

    start: Start | None = None
    kill: str | None = None


@dataclass
class Lines:
    """Whole lines from a descriptor that may give parts of them."""

    fd: int
    rest: bytes = b""

    def read(self) -> list[bytes] | None:
        """The lines that are here, or None at the end."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return lines


class Nursery:
    """The loop. ``load`` gives the job and what is to be said of it; it runs once, before any fork."""

    def __init__(self, commands: int, answers: int, load: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        self._lines = Lines(commands)
        self._answers = answers
        self._load = load
        self._children: dict[int, str] = {}
        self._job: Any = None
        self._lifeline, self._lifeline_end = os.pipe()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)

    def serve(self) -> None:
        """Until the commands end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker)
        try:
            self._job, about = self._load()
        except ShoalError as error:
            self._say({"refused": {"message": str(error), "exit_code": error.exit_code}})
            return
        self._say({"ready": about})
        while self._serve_once():
            pass
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._children:
            self._reap(0)

    def _serve_once(self) -> bool:
        ready, _, _ = select.select([self._lines.fd, self._woken], [], [])
        if self._woken in ready:
            with suppress(BlockingIOError):
                os.read(self._woken, 1 << 12)
            self._reap(os.WNOHANG)
        if self._lines.fd in ready:
            lines = self._lines.read()
            if lines is None:
                return False
            for line in lines:
                self._obey(msgspec.json.decode(line, type=Command))
        return True

    def _obey(self, command: Command) -> None:
        if command.start is not None:
            self._fork(command.start)
        for pid, name in self._children.items():
            if name == command.kill:
                os.kill(pid, signal.SIGKILL)

    def _fork(self, start: Start) -> None:
        pid = os.fork()
        if pid:
            self._children[pid] = start.name
            self._say({"started": start.name, "pid": pid})
            return
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in (self._lifeline_end, self._woken, self._waker, self._lines.fd, self._answers):
                os.close(fd)
            threading.Thread(target=_end_with, args=(self._lifeline,), daemon=True).start()
            code = _be_worker(self._job, start)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self, flags: int) -> None:
        while self._children:
            pid, status = os.waitpid(-1, flags)
            if pid == 0:
                return
            name = self._children.pop(pid, None)
            if name is not None:
                code = os.waitstatus_to_exitcode(status)
                reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                self._say({"exited": name, "reason": reason, "code": code})

    def _say(self, answer: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            os.write(self._answers, msgspec.json.encode(answer) + b"\n")


def _end_with(lifeline: int) -> NoReturn:
    os.read(lifeline, 1)
    os._exit(1)


def _be_worker(job: Any, start: Start) -> int:
    """In the fork: work, and say with the exit code how it ended."""
    with open(start.log, "ab", buffering=0) as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if start.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = dict(enumerate(visible.split(","))) if visible else {start.gpu: str(start.gpu)}
        os.environ["CUDA_VISIBLE_DEVICES"] = own.get(start.gpu, "")

    import torch

    from shoal.comm.keys import JobKey
    from shoal.launch.working import work
    from shoal.training.kit import Assignment

    torch.set_num_threads(job.num_threads or start.num_threads)
    assignment = Assignment(
        name=start.name,
        address=start.address,
        key=JobKey.read(Path(start.key_path)),
        store=start.store,
        job_hash=start.job_hash,
        host=start.host,
    )
    return work(job, assignment)


def gpu_for(about: dict[str, Any], used: Collection[int | None]) -> int | None:
    """The first GPU that no worker of a place uses, if the job wants one."""
    return next(n for n in count() if n not in used) if about["job"]["device"] == "cuda" else None


def first_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """What a nursery says of the job once it has tried it. ``ShoalError``: why it has not."""
    if "ended" in answer:
        raise ShoalError(f"{answer['ended']}; its output above says why")
    if "refused" in answer:
        kind = ConfigError if answer["refused"]["exit_code"] == ConfigError.exit_code else ShoalError
        raise kind(answer["refused"]["message"])
    about: dict[str, Any] = answer["ready"]
    return about


def warm_up() -> None:
    """Import what every worker needs, before any is forked. Torch gets one thread, so that it starts none here."""
    import torch

    import shoal.launch.working  # noqa: F401

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer of a process imports much of torch


def main() -> NoReturn:
    """``python -m shoal.launch.nursery JOB_FILE [FIELD=VALUE ...]``"""
    path, settings = Path(sys.argv[1]), sys.argv[2:]

    def load() -> tuple[Any, dict[str, Any]]:
        warm_up()
        from shoal.launch.rehearsal import tried

        return tried(path, settings)

    answers = os.dup(1)
    os.dup2(2, 1)
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    Nursery(0, answers, load).serve()
    sys.stderr.flush()
    os._exit(0)  # there is nothing to put in order, and an interpreter with torch in it takes seconds to do so


if __name__ == "__main__":
    main()
