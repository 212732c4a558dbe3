"""Processes that form a group and run one function each, met over queues instead of a coordinator."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from shoal.comm.collectives import Group, Seat
from shoal.comm.meeting import Meeting
from shoal.errors import ShoalError

LONG_S = 30.0
"""Longer than any test may take: what ends sooner ended by itself."""

Act = Callable[[Group, Connection], Any]

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["shoal.comm.collectives", "shoal.comm.link", "shoal.comm.transfer"])


def pump(meeting: Meeting, inbox: Connection) -> None:
    """Deliver what the other members say, until the line ends."""
    try:
        while True:
            meeting.deliver(*inbox.recv())
    except (EOFError, OSError):
        return


def _run(rank: int, world_size: int, act: Act, host: str, line: Connection, entries: Connection) -> None:
    meeting = Meeting(1, lambda key, value: entries.send((key, value)), LONG_S)
    threading.Thread(target=pump, args=(meeting, entries), daemon=True).start()
    try:
        group = Group.form(Seat(1, rank, world_size, host=host, timeout_s=LONG_S), meeting)
        line.send(("formed", None))
        line.send(("returned", act(group, line)))
        group.close()
    except ShoalError as error:
        line.send(("raised", error))


class Crew:
    """``act(group, line)`` in each of ``world_size`` processes. Leaving the block kills what is left of them."""

    def __init__(self, world_size: int, act: Act, hosts: list[str] | None = None, launch: Any = None) -> None:
        self._world_size = world_size
        self._act = act
        self._hosts = hosts or ["127.0.0.1"] * world_size
        self._launch = launch
        self.lines: list[Connection] = []
        self._entries: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Crew:
        for rank in range(self._world_size):
            line, far_line = forks.Pipe()
            entries, far_entries = forks.Pipe()
            args = (rank, self._world_size, self._act, self._hosts[rank], far_line, far_entries)
            target = _run if self._launch is None else self._launch
            process = forks.Process(target=target, args=args, daemon=True)
            process.start()
            far_line.close()
            far_entries.close()
            self.lines.append(line)
            self._entries.append(entries)
            self.processes.append(process)
        for rank, entries in enumerate(self._entries):
            threading.Thread(target=self._pass_on, args=(rank, entries), daemon=True).start()
        return self

    def _pass_on(self, rank: int, entries: Connection) -> None:
        try:
            while True:
                entry = entries.recv()
                for other, peer in enumerate(self._entries):
                    if other != rank:
                        peer.send(entry)
        except (EOFError, OSError):
            return

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in (*self.lines, *self._entries):
            connection.close()

    def says(self, rank: int, kind: str) -> Any:
        """The value of this member's next word, which must be of this kind."""
        line = self.lines[rank]
        assert line.poll(LONG_S), f"rank {rank} says nothing"
        came, value = line.recv()
        assert came == kind, f"rank {rank} {came} {value!r}"
        return value

    def results(self) -> list[Any]:
        """What every member returned."""
        return [self.says(rank, "returned") for rank in range(self._world_size) if self.says(rank, "formed") is None]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)


def until(condition: Callable[[], bool]) -> None:
    """Try again, each try waiting by itself, until it holds."""
    deadline_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
