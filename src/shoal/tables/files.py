"""Files that are written whole or not at all, and folders that one process writes to."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from shoal.errors import ConfigError, StoreFault

_LOCKED_S = 10.0


def write_whole(path: Path, data: bytes) -> None:
    """Have a file hold this, or what it held before. ``StoreFault`` if it cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        raise StoreFault(f"{path} could not be written: {error}") from None


def flush(path: Path) -> None:
    """Have the disk take a file, or what a folder says of its files."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def locked(folder: Path) -> int:
    """Be the one that writes to a folder, as long as the descriptor is open. ``ConfigError`` if another stays for 10 s:
    a process that has been replaced may still be ending."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + _LOCKED_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(fd)
                raise ConfigError(f"another process writes to {folder}; is it of a run that still goes on?") from None
            time.sleep(_LOCKED_S / 200)
