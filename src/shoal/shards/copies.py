"""Folders of other shards, as they are kept here for them: what ``mirror`` sends is written, and given back."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from shoal.comm.streams import Buffer
from shoal.errors import Behind, ConfigError, Fault, StoreFault
from shoal.shards import messages as msg
from shoal.tables.files import write_whole

TERM = "term"
FOLDER = "copies"
PIECE_BYTES = 1 << 22


class Copies:
    """Those in a shard's own folder. ``Fault`` for who has been replaced, ``Behind`` for what is not here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._done: dict[str, tuple[int, int]] = {}
        self._failed: dict[str, str] = {}
        """Why a shard's copy could not be written: what was to come after that is not written either."""
        self._sums: dict[tuple[str, int, int, int], int] = {}

    def look(self, asked: msg.Look) -> msg.Listing:
        """What is here of a shard; with a term, from now on for whom that is."""
        own = self._of(asked.shard)
        term = read_term(own)
        if asked.term:
            _check_term(asked.shard, asked.term, term)
            self._failed.pop(asked.shard, None)
            own.mkdir(parents=True, exist_ok=True)
            for path in own.rglob("*.partial"):
                path.unlink()
            write_whole(own / TERM, str(asked.term).encode())
        return msg.Listing(term, listing(own, self._sums))

    def write(self, asked: msg.Copy, body: Buffer) -> None:
        """Do what a shard has done to its files. What is asked twice is done once, and what a process before this one
        has done already makes no difference."""
        own = self._of(asked.shard)
        term = read_term(own)
        _check_term(asked.shard, asked.term, term)
        if asked.term > term:
            raise Behind(f"nothing of shard {asked.shard} is here for its term {asked.term}")
        if (asked.term, asked.number) <= self._done.get(asked.shard, (0, 0)):
            return
        if asked.shard in self._failed:
            raise StoreFault(self._failed[asked.shard])
        at = 0
        try:
            for change in asked.changes:
                self._do(_inside(own, change.file), change, body[at : at + change.num_bytes])
                at += change.num_bytes
        except StoreFault as error:
            self._failed[asked.shard] = str(error)
            raise
        self._done[asked.shard] = asked.term, asked.number

    def _do(self, path: Path, change: msg.Change, data: Buffer) -> None:
        partial = path.with_name(f"{path.name}.partial")
        try:
            match change.kind:
                case "write":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _write_at(path, change.at, data)
                case "whole" if not change.at:
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    partial.write_bytes(data)
                case "whole" if _size(partial) >= change.at:
                    _write_at(partial, change.at, data)
                case "done" if _size(partial) == change.at:
                    partial.replace(path)
                case "gone":
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreFault(f"the copy {path} could not be written: {error.strerror}; free some of its disk") from None

    def read(self, asked: msg.Fetch) -> bytes:
        """A part of a file."""
        try:
            with _inside(self._of(asked.shard), asked.file).open("rb") as file:
                file.seek(asked.at)
                return file.read(PIECE_BYTES)
        except OSError as error:
            raise StoreFault(f"the copy of {asked.file} cannot be read: {error.strerror}") from None

    def _of(self, shard: str) -> Path:
        return _inside(self._folder, shard)


def read_term(folder: Path) -> int:
    """Who writes to a folder, by number; 0 for one that nobody has written to."""
    path = folder / TERM
    return int(path.read_text()) if path.exists() else 0


def listing(folder: Path, sums: dict[tuple[str, int, int, int], int] | None = None) -> dict[str, msg.File]:
    """A shard's files, by their path within its folder; what is being written, and copies of others, are left out.
    ``sums``: what was summed before, which is not summed again."""
    found, sums = {}, {} if sums is None else sums
    for name in names(folder):
        path = folder / name
        here = path.stat()
        key = (str(path), here.st_ino, here.st_size, here.st_mtime_ns)
        if key not in sums:
            sums[key] = sum_of(path, here.st_size)
        found[name] = msg.File(here.st_size, sums[key])
    return found


def sum_of(path: Path, num_bytes: int) -> int:
    """XXH3-64 of a file's first bytes."""
    check = xxhash.xxh3_64()
    with path.open("rb") as file:
        while num_bytes and (data := file.read(min(num_bytes, PIECE_BYTES))):
            check.update(data)
            num_bytes -= len(data)
    return check.intdigest()


def names(folder: Path) -> list[str]:
    """The same without their contents: logs first, and snapshots before what tells of them."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != FOLDER]
        inner = os.path.relpath(parent, folder)
        found += [os.path.normpath(os.path.join(inner, name)) for name in files]
    kept = [name for name in found if not name.endswith((".partial", TERM, "lock"))]
    return sorted(kept, key=lambda name: (not is_log(name), is_small(name), name))


def is_small(name: str) -> bool:
    """Whether a file only tells of others, and is written anew when they change."""
    return not os.path.basename(name).startswith(("log-", "snapshot-", "gone-"))


def is_log(name: str) -> bool:
    """Whether a file only grows."""
    return os.path.basename(name).startswith("log-")


def _check_term(shard: str, asked: int, known: int) -> None:
    if asked < known:
        raise Fault(f"another process has taken the place of shard {shard}: this one's term is {asked}, not {known}")


def _inside(folder: Path, name: str) -> Path:
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder) or path == folder:
        raise ConfigError(f"{name!r} is no name of a shard or of its files")
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _write_at(path: Path, at: int, data: Buffer) -> None:
    """Write there; what is behind it stays."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written
    finally:
        os.close(fd)
