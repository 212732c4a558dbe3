"""Who is late: heartbeats in, suspicions out. Pure; the caller brings the time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class _Seen:
    at_s: float
    disconnected_at_s: float | None = None
    phase: str = ""
    phase_since_s: float = 0.0


@dataclass
class Detector:
    """Suspect a worker that is silent, disconnected for good, or stuck while others wait for it. See ``Patience``."""

    silent_s: float
    disconnected_s: float
    stuck_s: float
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def heard(self, worker: str, now_s: float, phase: str | None = None, phase_s: float = 0.0) -> None:
        """A worker spoke; a heartbeat also tells what it does and for how long."""
        seen = self._seen.setdefault(worker, _Seen(now_s))
        seen.at_s, seen.disconnected_at_s = now_s, None
        if phase is not None:
            seen.phase, seen.phase_since_s = phase, now_s - phase_s

    def disconnected(self, worker: str, now_s: float) -> None:
        """Its connection ended; it may yet come back."""
        if worker in self._seen:
            self._seen[worker].disconnected_at_s = now_s

    def forget(self, worker: str) -> None:
        self._seen.pop(worker, None)

    def stalled(self, members: Collection[str], patience_s: float, now_s: float) -> bool:
        """Whether all of these members have been waiting for each other for longer than ``patience_s``."""
        waits = [self._seen[m] for m in members if m in self._seen and self._seen[m].phase == "wait"]
        return len(waits) == len(members) > 1 and all(now_s - seen.phase_since_s > patience_s for seen in waits)

    def late(self, now_s: float) -> dict[str, str]:
        """The workers to give up, each with the reason."""
        reasons = {}
        waited_for = any(seen.phase == "wait" for seen in self._seen.values())
        for worker, seen in self._seen.items():
            if now_s - seen.at_s > self.silent_s:
                reasons[worker] = f"silent for {now_s - seen.at_s:.1f} s"
            elif seen.disconnected_at_s is not None and now_s - seen.disconnected_at_s > self.disconnected_s:
                reasons[worker] = "its connection ended"
            elif waited_for and seen.phase == "compute" and now_s - seen.phase_since_s > self.stuck_s:
                reasons[worker] = f"stuck in one step for {now_s - seen.phase_since_s:.0f} s while others wait"
        return reasons
