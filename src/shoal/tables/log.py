"""A write-ahead log: what was acknowledged is on the disk, whatever happens to the process.

A file of records: length (little-endian uint32) and XXH3-64 (uint64) of the body, then the body. A record counts once
it is whole and its sum is right; what a crash has torn is cut off when the log is opened again, and reported.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from shoal.errors import ConfigError, StoreFault

MAGIC = b"shoal log 1\n"
MOST_BYTES = 1 << 30
"""Of a record's body."""

_MOST_PARTS = 512
_HEAD = struct.Struct("<IQ")


@dataclass(frozen=True)
class Torn:
    """What was found behind the last whole record: where, how many bytes, and why they are no record."""

    at: int
    num_bytes: int
    reason: str


class Log:
    """Opens a log to append to it, and makes it if there is none. ``torn``: what was cut off for it.

    ``append`` returns once the record is in the file, and survives the process; ``flush`` once all are on the disk,
    and survive the machine. If the disk is full ``append`` raises ``StoreFault`` and the log is as before: nothing that
    was acknowledged is lost. ``StoreFault`` for a file that cannot be read, ``ConfigError`` for one that is no log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreFault(f"the log {path} cannot be opened: {error.strerror}") from None
        self.torn: Torn | None = None
        try:
            self._begin()
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self) -> None:
        size = os.fstat(self._fd).st_size
        start = os.pread(self._fd, len(MAGIC), 0)
        if not MAGIC.startswith(start):
            raise ConfigError(f"{self.path} is no log: it begins with {start!r}, and was to begin with {MAGIC!r}")
        if len(start) < len(MAGIC):  # new, or torn in its first line
            self._end = 0
            self._write([MAGIC])
            return
        *_, (self._end, reason) = [(len(MAGIC), ""), *((end, why) for _, end, why in _records(self._fd, size))]
        if self._end < size:
            self.torn = Torn(self._end, size - self._end, reason)
            os.ftruncate(self._fd, self._end)

    @property
    def num_bytes(self) -> int:
        """How long it is."""
        return self._end

    def append(self, *parts: bytes | memoryview) -> None:
        """Add a record whose body is these parts, one after another."""
        length = sum(len(part) for part in parts)
        if not 0 < length <= MOST_BYTES:
            raise ConfigError(f"a record of a log has from 1 to {MOST_BYTES} bytes, not {length}")
        check = xxhash.xxh3_64()
        for part in parts:
            check.update(part)
        self._write([_HEAD.pack(length, check.intdigest()), *parts])

    def _write(self, parts: list[bytes | memoryview]) -> None:
        if len(parts) > _MOST_PARTS:
            parts = [b"".join(parts)]
        left = sum(len(part) for part in parts)
        at = self._end
        try:
            while left:
                written = os.pwritev(self._fd, parts, at)
                at, left = at + written, left - written
                parts = _without(parts, written)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise StoreFault(f"the log {self.path} takes no more: {error.strerror}; free some of its disk") from None
        self._end = at

    def flush(self) -> None:
        """Have the disk take all that was appended."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StoreFault(f"the log {self.path} could not be written to its disk: {error.strerror}") from None

    def records(self) -> Iterator[bytes]:
        """The bodies, from the first on; those that are appended meanwhile are left out."""
        for body, _, _ in _records(self._fd, self._end):
            if body is not None:
                yield body

    def clear(self) -> None:
        """Forget all records: a snapshot holds what they did."""
        self._end = len(MAGIC)
        os.ftruncate(self._fd, self._end)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_records(path: Path, until: int, begin: int = 0) -> Iterator[bytes]:
    """The bodies of a log from byte ``begin``, where one begins, up to byte ``until``, without opening it to append: it
    may be in use."""
    reached = max(begin, len(MAGIC))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreFault(f"the log {path} cannot be opened: {error.strerror}") from None
    try:
        for body, at, reason in _records(fd, min(until, os.fstat(fd).st_size), reached):
            if body is None:
                raise StoreFault(f"the log {path} is damaged at byte {at}: {reason}")
            reached = at
            yield body
    finally:
        os.close(fd)
    if reached < until:
        raise StoreFault(f"the log {path} ends at byte {reached}, and was to hold {until}")


def _records(fd: int, size: int, at: int = len(MAGIC)) -> Iterator[tuple[bytes | None, int, str]]:
    """Each whole record's body and end; at last, if something is left, None, where that begins, and what is wrong."""
    while at < size:
        head = os.pread(fd, _HEAD.size, at)
        if len(head) < _HEAD.size:
            yield None, at, "it ends within a record's head"
            return
        length, check = _HEAD.unpack(head)
        body = os.pread(fd, length, at + _HEAD.size) if 0 < length <= min(MOST_BYTES, size - at) else b""
        if len(body) < max(1, length):
            yield None, at, "it ends within a record"
            return
        if xxhash.xxh3_64_intdigest(body) != check:
            yield None, at, "a record's sum is wrong"
            return
        at += _HEAD.size + length
        yield body, at, ""


def _without(parts: list[bytes | memoryview], num_bytes: int) -> list[bytes | memoryview]:
    """What is left of parts after their first bytes."""
    left: list[bytes | memoryview] = []
    for part in parts:
        skipped = min(num_bytes, len(part))
        num_bytes -= skipped
        if skipped < len(part):
            left.append(memoryview(part)[skipped:])
    return left
