"""Records of what happened: one JSON object a line, appended by one process, read by anyone.

An event is ``{"at_s", "kind", "source", ...}``; ``at_s`` is wall time, ``source`` is who saw it (``coordinator``,
``driver``, or a worker's name). The kinds are listed in ``docs/reference/events.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

Event = dict[str, Any]


class EventLog:
    """Append events to a file, each by one ``write`` in append mode.

    A disk that is full loses the line and is counted in ``num_lost``: a log never stops what it records. A line that
    was torn, by it or by a crash, is ended before the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lost = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._is_torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def append(self, event: Event) -> None:
        line = msgspec.json.encode(event) + b"\n"
        if self._is_torn:
            line = b"\n" + line
        try:
            num_written = os.write(self._fd, line)
        except OSError:
            self.num_lost += 1
            return
        if num_written < len(line):
            self.num_lost += 1
        self._is_torn = num_written < len(line)

    def close(self) -> None:
        os.close(self._fd)


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The whole events from byte ``offset`` on, and the offset to go on from. A torn last line is left for later."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return list(_decode(whole)), offset + len(whole)


def _decode(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            yield msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
