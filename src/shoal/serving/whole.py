"""Files and folders that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import ConfigError, StoreFault
from shoal.tables.files import flush


def refuse_present(target: Path) -> None:
    """``ConfigError`` if there is something of that name already."""
    if os.path.lexists(target):
        raise ConfigError(f"{target} is there already; name another, or remove it")


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, of the same name; at the end it becomes ``target``, or nothing if that
    fails. ``ConfigError`` if ``target`` is there already, ``StoreFault`` for an error of the disk's."""
    refuse_present(target)
    place = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        place.mkdir(parents=True)
        yield place / target.name
        flush(place / target.name)
        (place / target.name).rename(target)
        flush(target.parent)
    except OSError as error:
        raise StoreFault(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
