"""Python processes that begin with modules loaded: forks of one that has loaded them, in the place of who asked.

A lab's hosts are one machine, and to load torch on each takes seconds of its few cores. ``serve`` loads it once and
listens on a socket. ``run`` is the words before a command on a host: it sends its command, environment, folder,
input and output; the fork enters its namespaces and its cgroup, and is from then on what the command would have been.
``run`` passes signals on, ends as the fork does, and if it ends first the fork is killed. What is not this Python, with
``-m`` or a file, it executes itself.

This file is run by its path, with the standard library alone, so that ``run`` starts in milliseconds and a fork has
nothing of Shoal's loaded that may have been changed since.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

_CONNECT_S, _SAY_S = 10.0, 2.0
_LENGTH = struct.Struct("!I")
_STANDARD = (0, 1, 2)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SPACES = ("net", "mnt")


# What is said on the socket


def _send(to: socket.socket, value: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    text = json.dumps(value).encode()
    socket.send_fds(to, [_LENGTH.pack(len(text))], fds)
    to.sendall(text)


def _receive(of: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """What was sent, with descriptors; None if the other end is gone, or falls silent in the middle of it."""
    fds: list[int] = []
    try:
        head, fds, _, _ = socket.recv_fds(of, _LENGTH.size, len(_STANDARD))
        head += _exactly(of, _LENGTH.size - len(head))
        return json.loads(_exactly(of, _LENGTH.unpack(head)[0])), fds
    except (EOFError, OSError):
        for fd in fds:
            os.close(fd)
        return None


def _exactly(of: socket.socket, num_bytes: int) -> bytes:
    text = b""
    while len(text) < num_bytes:
        more = of.recv(num_bytes - len(text))
        if not more:
            raise EOFError
        text += more
    return text


# Who asks


def run(path: str, group: str, command: list[str]) -> NoReturn:
    """Be the command."""
    if not _is_for_a_fork(command):
        os.execvp(command[0], command)
    server = _connected(path)
    child: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for pid in child:
            os.kill(pid, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    asked = {"argv": command[1:], "env": dict(os.environ), "folder": os.getcwd(), "group": group}
    _send(server, asked, _STANDARD)
    while (answer := _receive(server)) is not None:
        said, _ = answer
        if "pid" in said:
            child.append(said["pid"])
        else:
            _end_as(said["code"])
    sys.exit(f"the process that was to run `{' '.join(command)}` has ended")


def _is_for_a_fork(command: list[str]) -> bool:
    same = os.path.abspath(command[0]) == os.path.abspath(sys.executable)
    return same and len(command) > 1 and (command[1] == "-m" or command[1].endswith(".py"))


def _connected(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    deadline_s = time.monotonic() + _CONNECT_S
    while True:
        try:
            server.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline_s:
                sys.exit(f"nobody listens at {path} to run a command; is the lab still there?")
            time.sleep(0.01)
        else:
            return server


def _end_as(code: int) -> NoReturn:
    if code < 0:
        with suppress(OSError):  # SIGKILL takes no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# Who answers


@dataclass
class Fork:
    """What a fork is to be."""

    argv: list[str]
    env: dict[str, str]
    folder: str

    def be(self) -> None:
        """Run it, as the interpreter would."""
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.folder)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()  # each fork by itself; Python's own generator does so
        paths = [os.path.abspath(path) for path in self.env.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:0] = [path for path in paths if path not in sys.path]
        if self.argv[0] == "-m":
            sys.path.insert(0, self.folder)
            sys.argv = self.argv[1:]
            runpy.run_module(self.argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(self.argv[0]).resolve().parent))
            sys.argv = list(self.argv)
            runpy.run_path(self.argv[0], run_name="__main__")


@dataclass
class Server:
    """One thread, which makes no use of torch, so that a fork of it is sound."""

    listener: socket.socket
    askers: dict[int, socket.socket] = field(default_factory=dict)
    """Who asked for each fork, by its process id."""

    def serve(self) -> Fork:
        """Returns in a fork only, as what it is to be."""
        woken, waker = os.pipe()
        for end in (woken, waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker)
        while True:
            sources: list[socket.socket | int] = [self.listener, woken, *self.askers.values()]
            ready, _, _ = select.select(sources, [], [])
            if woken in ready:
                with suppress(BlockingIOError):
                    os.read(woken, 1 << 12)
                self._reap()
            for pid, asker in list(self.askers.items()):
                if asker in ready:  # it says nothing more: it has ended
                    _kill(pid)
            if self.listener in ready and (fork := self._answer(self.listener.accept()[0])) is not None:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(woken)
                os.close(waker)
                return fork

    def _answer(self, asker: socket.socket) -> Fork | None:
        asker.settimeout(_SAY_S)  # it may be killed or frozen in the middle of a word
        asked = _receive(asker)
        if asked is None:
            asker.close()
            return None
        said, fds = asked
        credentials = asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        asker_pid = struct.unpack("3i", credentials)[0]
        pid = os.fork()
        if pid == 0:
            for connection in (self.listener, asker, *self.askers.values()):
                connection.close()
            _take_the_place_of(asker_pid, said["group"], fds)
            return Fork(said["argv"], said["env"], said["folder"])
        for fd in fds:
            os.close(fd)
        self.askers[pid] = asker
        with suppress(OSError):
            _send(asker, {"pid": pid})
        return None

    def _reap(self) -> None:
        while self.askers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self.askers.pop(pid) as asker, suppress(OSError):
                _send(asker, {"code": os.waitstatus_to_exitcode(status)})


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _take_the_place_of(pid: int, group: str, fds: list[int]) -> None:
    """In the fork: its cgroup, its namespaces, its input and output, a session of its own."""
    os.setsid()
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    for standard, fd in zip(_STANDARD, fds, strict=True):
        os.dup2(fd, standard)
        os.close(fd)
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _SPACES]
    libc = ctypes.CDLL(None, use_errno=True)
    for space in spaces:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), f"a namespace of process {pid} cannot be entered")
        os.close(space)


def _load(words: str) -> None:
    """Import a module; ``MODULE:NAME.NAME``: and call what is there."""
    module, _, names = words.partition(":")
    found: Any = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    if names:
        found()


def main() -> None:
    what, path, *rest = sys.argv[1:]
    if what == "run":
        run(path, rest[0], rest[1:])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    for words in rest:
        _load(words)
    Server(listener).serve().be()


if __name__ == "__main__":
    main()
