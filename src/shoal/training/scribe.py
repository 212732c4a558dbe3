"""Writes versions to the run's store, off the critical path: one member of a generation does."""

from __future__ import annotations

from collections.abc import Callable

from shoal.clock import Clock
from shoal.errors import StoreFault
from shoal.job import Job
from shoal.training.replica import Replica
from shoal.versions import BackgroundWriter, Failed, Saved, Snapshot

_FINAL_TRIES = 3
_FINAL_WAIT_S = 600.0


class Scribe:
    """Captures a version when one is due, and hands it to the writer once it is known to be stable."""

    def __init__(self, job: Job, replica: Replica, writer: BackgroundWriter, clock: Clock) -> None:
        self._job = job
        self._replica = replica
        self._writer = writer
        self._clock = clock
        self._pending: Snapshot | None = None
        self._stored_at_s = clock.monotonic_s()
        self._stored_step = replica.step

    def at_boundary(self, cursors: Callable[[], list[int]]) -> bool:
        """Between two rounds: copy what the replica holds if a version is due; whether it was."""
        due = self.is_due(self._replica.step)
        if due:
            self.capture(cursors())
        return due

    def is_due(self, version: int) -> bool:
        """Whether ``version`` is to be stored, the one before it having been looked at."""
        storing = self._job.storing
        if version <= self._stored_step or self._pending is not None:
            return False
        if (
            storing.every_steps is not None
            and version // storing.every_steps > self._stored_step // storing.every_steps
        ):
            return True
        elapsed_s = self._clock.monotonic_s() - self._stored_at_s
        return storing.every_s is not None and elapsed_s >= storing.every_s

    def capture(self, cursors: list[int], num_active: int | None = None) -> None:
        """Copy what the replica holds, to be stored once it is stable. ``num_active``: see ``Replica.capture``."""
        self._pending = self._replica.capture(num_active, cursors=cursors)
        self._stored_at_s, self._stored_step = self._clock.monotonic_s(), self._replica.step

    def discard(self) -> None:
        """What was captured is not to be stored."""
        self._pending = None

    def stable(self, step: int) -> None:
        """Every member holds version ``step``."""
        if self._pending is not None and self._pending.step <= step:
            self._writer.submit(self._pending)
            self._pending = None

    def news(self) -> list[Saved | Failed]:
        """What the writer has done since the last time."""
        return self._writer.poll()

    def store_now(self, cursors: list[int], num_active: int | None = None) -> list[Saved | Failed]:
        """Store what the replica holds, which is stable, and wait for it. ``StoreFault`` if the store takes it not."""
        self.capture(cursors, num_active)
        snapshot, self._pending = self._pending, None
        assert snapshot is not None
        news: list[Saved | Failed] = []
        for _ in range(_FINAL_TRIES):
            self._writer.submit(snapshot)
            self._writer.drain(_FINAL_WAIT_S)
            news += self._writer.poll()
            if any(isinstance(w, Saved) and w.step == snapshot.step for w in news):
                return news
        reason = next((w.reason for w in reversed(news) if isinstance(w, Failed)), "it did not answer")
        raise StoreFault(f"the version of step {snapshot.step} could not be stored: {reason}", step=snapshot.step)
