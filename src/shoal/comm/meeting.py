"""Where a generation's members find each other: a torch ``Store`` over the encrypted control link.

Each member publishes its own entries; the coordinator passes them on to all members of the generation. So addresses
are exchanged only among holders of the job's key, and no store server listens anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.errors import Fault, Halted


class Meeting(Store):
    """One generation's entries. ``publish(key, value)`` sends ours; ``deliver`` takes everyone's, from any thread."""

    def __init__(self, generation: int, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self.generation = generation
        self._publish = publish
        self._timeout_s = timeout_s
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._cancelled = False

    def deliver(self, key: str, value: bytes) -> None:
        with self._changed:
            self._entries[key] = value
            self._changed.notify_all()

    def cancel(self) -> None:
        """End every wait with ``Halted``: the generation is over before it has met."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def notify(self) -> None:
        """Have ``wait_until`` look again."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait for ``done`` and for ``notify``, in whatever order. ``Halted`` once the meeting is cancelled."""
        with self._changed:
            while not done():
                if self._cancelled:
                    raise Halted("the generation ended before its members had met", generation=self.generation)
                self._changed.wait()

    # The part of torch's interface that rendezvous uses

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.deliver(key, data)
        self._publish(key, data)

    def get(self, key: str) -> bytes:
        deadline_s = time.monotonic() + self._timeout_s
        with self._changed:
            while key not in self._entries:
                if self._cancelled:
                    raise Halted("the generation ended before its members had met", generation=self.generation)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    message = f"a member did not come to generation {self.generation} within {self._timeout_s:g} s"
                    raise Fault(message, generation=self.generation)
            return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._entries for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()
