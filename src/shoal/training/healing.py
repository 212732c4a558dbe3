"""Catching up without stopping the others.

A member that lacks the generation's base version shadows the others: it takes part in every collective without samples,
so it is given all that they agree, and keeps it. Meanwhile it copies the base version from a peer in the background.
Then it replays what it kept, and stands where they stand, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from shoal.comm.transfer import Parcel
from shoal.errors import ShoalError
from shoal.training.replica import Replica, unpack
from shoal.training.round import Round

_MOST_KEPT = 64
_LEAST_REPLAYED = 2


class Shadow:
    """One member's way from nothing (or a step behind) to the others' step. Used by the loop between steps."""

    def __init__(self, replica: Replica, fetch: Callable[[], Parcel]) -> None:
        self._replica = replica
        self._fetch = fetch
        self._parcel: Parcel | None = None
        self._error: ShoalError | None = None
        self._restored = False
        self._kept: deque[Round] = deque()
        self._thread = threading.Thread(target=self._run, name="shoal-heal", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._parcel = self._fetch()
        except ShoalError as error:
            self._error = error

    @property
    def must_wait(self) -> bool:
        """Whether as much is kept as may be: the others wait with us until the copy is here."""
        return len(self._kept) >= _MOST_KEPT and self._thread.is_alive()

    def keep(self, done: Round) -> None:
        """Remember what the others committed."""
        self._kept.append(replace(done, agreed=done.agreed.copy()))

    def advance(self, budget_s: float) -> bool:
        """Use about ``budget_s`` to catch up; True once nothing is left. Raises what the copying met."""
        if self._error is not None:
            raise self._error
        if self._parcel is None:
            return False
        if not self._restored:
            self._replica.restore(unpack(self._parcel))
            self._restored = True
        began_s = time.monotonic()
        num_replayed = 0
        while self._kept and (num_replayed < _LEAST_REPLAYED or time.monotonic() - began_s < budget_s):
            self._replica.commit(self._kept.popleft())
            num_replayed += 1
        return not self._kept

    def wait(self, timeout_s: float) -> None:
        """Wait for the copy, at most this long."""
        self._thread.join(timeout_s)
