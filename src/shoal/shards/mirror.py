"""A shard's folder is kept by a second shard too, its *standby*, so that a host that is lost with its disk loses
nothing.

What has changed is found by looking at the folder: logs have grown, other files are new, or gone. That is sent in such
an order that what has come is a folder to start from, whenever the rest does not. What happens while it is under way
goes with the next pass, so many pushes share one. Whoever writes has a ``term``, more than the one before it: who
was given up, and does not know it, is refused. It is more by a random number, so that no two ever have the same.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.comm.calls import Calls
from shoal.comm.keys import JobKey
from shoal.comm.streams import Loop
from shoal.errors import Fault, StoreFault
from shoal.shards import messages as msg
from shoal.shards.copies import FOLDER, PIECE_BYTES, TERM, is_log, is_small, names, read_term, sum_of
from shoal.tables.files import write_whole

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(msg.Answer)
_MOST_IN_FLIGHT = 8
_LARGEST_STEP = 1 << 32
_PATIENCE_S = 5.0
_RETRY_S = 1.0
"""So long after a beginning, at least, comes the next one with the same standby."""


@dataclass(frozen=True)
class _State:
    """A file as the standby has it."""

    inode: int
    num_bytes: int
    changed_ns: int


class Mirror:
    """``ship`` after a change, and ``turn`` whenever something may have come; what the number says that ``ship`` gave
    is safe once ``reached`` is that far. ``is_begun``: the folder holds what there was; before that it must not be
    used. ``turn`` raises ``Fault`` if another process has taken this one's place, and ``StoreFault`` if the folder is
    gone.
    """

    def __init__(self, shard: str, folder: Path, key: JobKey | None, loop: Loop | None = None) -> None:
        self.is_begun = False
        self.reached = 0
        self.standby = ""
        self.restored_bytes = 0
        """So much was taken back from the standby, for the folder was not there or was older."""
        self.trouble = ""
        """Why the standby cannot keep what it is sent; empty once it can."""
        self._troubled_since_s = 0.0
        self._shard = shard
        self._folder = folder
        self._calls = Calls(key, {}, loop)
        self._term = read_term(folder)
        self._has_claimed = False
        self._beginning: Generator[int, tuple[msg.Answer, memoryview], None] | None = None
        self._again_at_s: float | None = None
        self._began_at_s = 0.0
        self._asked = 0
        self._at_standby: dict[str, _State] = {}
        self._pass, self._wanted = 0, 0
        self._changes: Iterator[tuple[msg.Change, bytes]] | None = None
        self._sent: deque[int] = deque()
        self._number = 0

    def meet(self, standby: str, address: str) -> None:
        """The standby is found there from now on."""
        is_another = standby != self.standby
        if is_another and self.standby:
            self._calls.part(self.standby)
        self.standby = standby
        self._calls.meet(standby, address)
        if is_another:
            self.trouble = ""
            self._begin()

    @property
    def has_failed(self) -> bool:
        """Whether the standby has not been able to for some seconds, and cannot now."""
        lasting_s = time.monotonic() - self._troubled_since_s
        return bool(self.trouble) and self._again_at_s is not None and lasting_s > _PATIENCE_S

    def ship(self) -> int:
        """Have the standby hear of what has changed, from the next ``turn`` on: the number that tells when it has."""
        self._wanted = self._pass + 1
        return self._wanted

    def turn(self) -> None:
        """Take what has come, and send what is next."""
        self._calls.take()
        try:
            if self._again_at_s is not None:
                if time.monotonic() >= self._again_at_s:
                    self._begin()
            elif self._beginning is not None:
                self._go_on_beginning()
            elif self._changes is not None:
                self._go_on()
            elif self._wanted > self._pass and self.is_begun:
                self._next_pass()
        except _Lost as lost:
            self._stop()
            self._again_at_s = self._began_at_s + _RETRY_S
            if not self.trouble:
                self._troubled_since_s = time.monotonic()
            self.trouble = lost.reason

    # From where on

    def _begin(self) -> None:
        """Learn what the standby has; the first time, also whether this folder is the newest."""
        self._stop()
        self._began_at_s, self._again_at_s = time.monotonic(), None
        self._beginning = self._found()
        self._asked = next(self._beginning)

    def _stop(self) -> None:
        """Whatever is under way is of no use."""
        self._calls.forget_all()
        self._sent.clear()
        self._changes = self._beginning = None

    def _go_on_beginning(self) -> None:
        while self._beginning is not None and (came := self._calls.answer(self._asked)) is not None:
            try:
                self._asked = self._beginning.send((_checked(came[0]), came[1]))
            except StopIteration:
                self._beginning = None
                self.is_begun = True
                self._next_pass()

    def _found(self) -> Generator[int, tuple[msg.Answer, memoryview], None]:
        there = yield from self._look(0)
        if not self._has_claimed:
            if there.term > self._term:
                yield from self._restore(there)
            self._term = max(self._term, there.term) + 1 + secrets.randbelow(_LARGEST_STEP)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / TERM, str(self._term).encode())
            self._has_claimed = True
        there = yield from self._look(self._term)
        self._at_standby = {}
        for name, file in there.files.items():
            self._at_standby[name] = self._compared(name, file)

    def _look(self, term: int) -> Generator[int, tuple[msg.Answer, memoryview], msg.Listing]:
        answer, _ = yield self._ask(msg.Look(self._shard, term))
        assert isinstance(answer, msg.Listing)
        return answer

    def _restore(self, there: msg.Listing) -> Generator[int, tuple[msg.Answer, memoryview], None]:
        """Have the folder be what the standby has. Its term is written last: until then this is done again."""
        for path in self._folder.glob("*"):
            if path.name != FOLDER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, file in there.files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                while out.tell() < file.num_bytes:
                    _, data = yield self._ask(msg.Fetch(self._shard, name, out.tell()))
                    if not data:
                        raise Fault(f"the copy of {name} at {self.standby} is shorter than it said")
                    out.write(data)
            self.restored_bytes += file.num_bytes

    def _compared(self, name: str, there: msg.File) -> _State:
        """How much of a file at the standby is as here; of one that is not, nothing."""
        path = self._folder / name
        if path.exists():
            here = path.stat()
            is_long_enough = here.st_size >= there.num_bytes if is_log(name) else here.st_size == there.num_bytes
            if is_long_enough and sum_of(path, there.num_bytes) == there.sum:
                return _State(here.st_ino, there.num_bytes, here.st_mtime_ns)
        return _State(0, 0, 0)

    # What has changed

    def _next_pass(self) -> None:
        self._pass += 1
        self._wanted = max(self._wanted, self._pass)
        self._changes = self._look_around()
        self._go_on()

    def _go_on(self) -> None:
        while self._sent and (came := self._calls.answer(self._sent[0])) is not None:
            self._sent.popleft()
            _checked(came[0])
        assert self._changes is not None
        while len(self._sent) < _MOST_IN_FLIGHT and (batch := _message(self._changes)):
            changes, datas = zip(*batch, strict=True)
            self._number += 1
            copy = msg.Copy(self._shard, self._term, self._number, changes)
            self._sent.append(self._ask(copy, b"".join(datas)))
        if not self._sent:
            self.reached, self._changes, self.trouble = self._pass, None, ""
            if self._wanted > self._pass:
                self._next_pass()

    def _look_around(self) -> Iterator[tuple[msg.Change, bytes]]:
        """All that has changed up to now: what changes while this is under way is the next pass's."""
        here = names(self._folder)
        if read_term(self._folder) != self._term:
            raise StoreFault(f"{self._folder} is gone, or another process writes to it; the copy of it stays")
        changed: list[tuple[str, _State, bytes]] = []
        for name in here:
            found = os.stat(self._folder / name)
            state = _State(found.st_ino, found.st_size, found.st_mtime_ns)
            if state != self._at_standby.get(name):
                changed.append((name, state, (self._folder / name).read_bytes() if is_small(name) else b""))
        for name, state, data in changed:
            with suppress(FileNotFoundError):  # the next pass tells of that
                yield from self._file(name, state, data)
        for name in set(self._at_standby) - set(here):
            yield msg.Change(name, "gone", 0, 0), b""
            del self._at_standby[name]

    def _file(self, name: str, state: _State, data: bytes) -> Iterator[tuple[msg.Change, bytes]]:
        known = self._at_standby.get(name, _State(0, 0, 0))
        if is_log(name) and state.inode == known.inode and state.num_bytes >= known.num_bytes:
            yield from self._parts(name, "write", known.num_bytes, state.num_bytes)
        elif is_small(name):
            yield msg.Change(name, "whole", 0, len(data)), data
            yield msg.Change(name, "done", len(data), 0), b""
        else:
            yield from self._parts(name, "whole", 0, max(1, state.num_bytes))
            yield msg.Change(name, "done", state.num_bytes, 0), b""
        self._at_standby[name] = state

    def _parts(self, name: str, kind: msg.Kind, start: int, stop: int) -> Iterator[tuple[msg.Change, bytes]]:
        with (self._folder / name).open("rb") as file:
            for at in range(start, stop, PIECE_BYTES):
                file.seek(at)
                data = file.read(min(PIECE_BYTES, stop - at))
                yield msg.Change(name, kind, at, len(data)), data

    def _ask(self, message: msg.Question, body: bytes = b"") -> int:
        return self._calls.ask(self.standby, _ENCODER.encode(message), body)

    def close(self) -> None:
        self._calls.close()


class _Lost(Exception):
    """The standby does not have what it was sent: it has been replaced, or, for a ``reason``, could not write it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _message(changes: Iterator[tuple[msg.Change, bytes]]) -> list[tuple[msg.Change, bytes]]:
    batch, num_bytes = [], 0
    for change, data in changes:
        batch.append((change, data))
        num_bytes += len(data)
        if num_bytes >= PIECE_BYTES:
            break
    return batch


def _checked(head: Any) -> msg.Answer:
    answer: msg.Answer = _DECODER.decode(head)
    if isinstance(answer, msg.Refused):
        if answer.kind == "Fault":
            raise Fault(answer.reason)
        raise _Lost(answer.reason if answer.kind == "StoreFault" else "")
    return answer
