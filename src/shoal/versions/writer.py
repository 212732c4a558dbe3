"""Versions written off the critical path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.versions.snapshot import Snapshot
from shoal.versions.versions import Versions


@dataclass(frozen=True)
class Saved:
    """This version is stored, whole."""

    step: int
    fingerprint: str


@dataclass(frozen=True)
class Failed:
    """This version could not be stored; those before it are as they were."""

    step: int
    reason: str


class BackgroundWriter:
    """Writes snapshots one at a time in a thread of its own. Call its methods from one thread.

    While one is written, only the newest of those submitted since waits: the store's speed sets how often versions are
    written, and at most two snapshots are in memory. A write that fails is told by ``poll``, and the next is tried.
    ``check`` runs before each write, and may raise to refuse it.
    """

    def __init__(self, versions: Versions, check: Callable[[], None] = lambda: None) -> None:
        self._versions = versions
        self._check = check
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._writing = False
        self._closed = False
        self._outcomes: list[Saved | Failed] = []
        self._thread = threading.Thread(target=self._run, name="shoal-version-writer", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Have ``snapshot`` written; it must not change any more. Never waits. One that still waits is dropped."""
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()

    def poll(self) -> list[Saved | Failed]:
        """What was written or failed since the last call, in order. Never waits."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything submitted is written or has failed; whether it was within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._writing, timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop what waits, and wait at most ``timeout_s`` for what is being written: cut off, it leaves no trace."""
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (snapshot := self._next()) is not None:
            outcome = self._write(snapshot)
            del snapshot
            with self._changed:
                self._outcomes.append(outcome)
                self._writing = False
                self._changed.notify_all()

    def _next(self) -> Snapshot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            snapshot, self._waiting = self._waiting, None
            self._writing = snapshot is not None
            return snapshot

    def _write(self, snapshot: Snapshot) -> Saved | Failed:
        try:
            self._check()
            manifest = self._versions.write(snapshot)
        except ShoalError as error:
            return Failed(snapshot.step, error.message)
        except Exception as error:  # noqa: BLE001 — training goes on and is told, also of what no one foresaw
            return Failed(snapshot.step, f"{type(error).__name__}: {error}")
        return Saved(manifest.step, manifest.fingerprint)
