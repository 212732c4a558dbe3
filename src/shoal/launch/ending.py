"""How a command that takes long to begin ends by SIGTERM meanwhile. Light: it is there before all else is."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def heeds_sigterm() -> Iterator[None]:
    """Within this SIGTERM ends the process at once, until something else handles it. The first process of a container
    would not hear it, else: the kernel drops what such a process has no handler for. Main thread only."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> NoReturn:
    """By the signal, as it would have without a handler; which a container's first process does not: with 128 + n."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)
