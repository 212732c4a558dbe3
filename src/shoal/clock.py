"""Time as a value: code that waits or measures takes a ``Clock``, so that tests turn the hands themselves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings and a pause."""

    def monotonic_s(self) -> float:
        """Seconds that never run backwards; only differences mean anything."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, for records that people read."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Return after ``duration_s``."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)
