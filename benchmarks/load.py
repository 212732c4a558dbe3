"""Requests to a server over HTTP from h2load, as fast as connections allow or at a rate; each by its status.

h2load is nghttp2's, in C; it writes when each request began, how it was answered and how long that took. At a rate the
requests are on time however long answers take, up to as many in flight as are sent in ``PERIOD_S``: each connection
sends one in that time, and connections begin one after another.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

PERIOD_S = 1.0
WARM_UP_S = 1.0
OK, REFUSALS = 200, (429, 503)
CUT_OFF = 0
"""The status of what was under way when the time was over."""
LONGEST_PERIOD_MS, MOST_AT_ONCE, CLOSE_ENOUGH = 50, 8, 0.01


class Answer(NamedTuple):
    """``begun_us``: when the request was sent, microseconds since 1970. A status of -1 is none."""

    begun_us: int
    status: int
    took_us: int


@dataclass(frozen=True)
class Load:
    """What came of the requests that were sent within ``duration_s``. Without an answer of a kind its latency is
    None. ``within_ms`` counts."""

    duration_s: float
    offered_per_s: float
    requests_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    by_status: dict[int, int]
    refused_p99_ms: float | None
    errors: int
    latencies_ms: Sequence[float] = field(default=(), repr=False)
    """Of the 200s."""

    @classmethod
    def of(cls, answers: Sequence[Answer], duration_s: float, unanswered: int = 0) -> Load:
        """From what was answered, and how many were not."""
        by_status = Counter(answer.status for answer in answers)
        fine = [answer.took_us / 1e3 for answer in answers if answer.status == OK]
        refused = [answer.took_us / 1e3 for answer in answers if answer.status in REFUSALS]
        failed = by_status.pop(-1, 0) + by_status.pop(CUT_OFF, 0) + unanswered
        return cls(
            duration_s=duration_s,
            offered_per_s=(len(answers) + unanswered) / duration_s,
            requests_per_s=len(fine) / duration_s,
            p50_ms=percentile(fine, 50),
            p99_ms=percentile(fine, 99),
            by_status=dict(sorted(by_status.items())),
            refused_p99_ms=percentile(refused, 99),
            errors=failed,
            latencies_ms=fine,
        )

    def within_per_s(self, deadline_ms: float) -> float:
        """How many a second were answered with 200 in that time."""
        return sum(latency <= deadline_ms for latency in self.latencies_ms) / self.duration_s

    @property
    def answered_fraction(self) -> float:
        """Of what was sent, the part that was answered with 200."""
        sent = sum(self.by_status.values()) + self.errors
        return self.by_status.get(OK, 0) / sent if sent else 0.0

    def record(self) -> dict[str, object]:
        """All but the single latencies, as JSON has it."""
        told = {name: value for name, value in vars(self).items() if name != "latencies_ms"}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in told.items()}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """None of none."""
    return float(np.percentile(values, percent)) if values else None


def parse(log: str) -> list[Answer]:
    """Of h2load's log, whose last line may be cut off."""
    lines = log.splitlines(keepends=True)
    whole = (line.split("\t") for line in lines if line.endswith("\n"))
    return [Answer(int(begun), int(status), int(took)) for begun, status, took, *_ in whole]


def spacing(rate: float) -> tuple[int, int]:
    """How many connections begin at once, and after how many milliseconds the next ones do: for each to send one in
    about ``PERIOD_S``, as evenly as whole milliseconds allow."""
    best = (1, 1)
    for at_once in range(1, MOST_AT_ONCE + 1):
        every_ms = min(LONGEST_PERIOD_MS, max(1, round(1e3 * at_once / rate)))
        if _miss(rate, (at_once, every_ms)) < _miss(rate, best):
            best = (at_once, every_ms)
        if _miss(rate, best) <= CLOSE_ENOUGH:
            break
    return best


def _miss(rate: float, found: tuple[int, int]) -> float:
    return abs(1e3 * found[0] / found[1] / rate - 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, what each says, and which core sends them; None: any."""

    url: str
    body: Path
    content_type: str = "application/json"
    core: int | None = None


def load(
    target: Target, *, connections: int = 1, duration_s: float, rate: float | None = None, warm_up_s: float = WARM_UP_S
) -> Load:
    """Measure: ``connections``, each of which sends when it is answered, or ``rate`` requests a second, of which the
    first ``WARM_UP_S`` begin all connections. What is sent before is not counted. Ends soon after ``duration_s`` more,
    even if there are no answers."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if rate is None:
            words = ["-c", connections, f"-D{round(1e3 * duration_s)}ms", f"--warm-up-time={round(1e3 * warm_up_s)}ms"]
        else:
            at_once, every_ms = spacing(rate)
            rate = 1e3 * at_once / every_ms
            clients = max(1, round(rate * PERIOD_S))
            total = clients * max(1, round((WARM_UP_S + duration_s) / PERIOD_S))
            words = ["-c", clients, "-n", total, "-r", at_once, f"--rate-period={every_ms}ms"]
            words += [f"--rps={rate / clients:.6f}"]
        command = [*_h2load(target.core), "--h1", *map(str, words), f"--log-file={log}", "-d", str(target.body)]
        command += ["-H", f"content-type: {target.content_type}", target.url]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=3 * (WARM_UP_S + duration_s) + 10)
        except subprocess.TimeoutExpired:
            done = None
        if done and done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
        answers = parse(log.read_text()) if log.exists() else []
    if rate is None:
        return Load.of([answer for answer in answers if answer.status != CUT_OFF], duration_s)
    return at_a_rate(answers, rate, duration_s)


def at_a_rate(answers: Sequence[Answer], rate: float, duration_s: float) -> Load:
    """Of what was sent once all connections were there. Those that were due by then and are not in the log were never
    answered, or could not be sent since the ones before them were not."""
    if not answers:
        return Load.of([], duration_s, round(rate * duration_s))
    begun_us = min(answer.begun_us for answer in answers) + round(1e6 * WARM_UP_S)
    until_us = begun_us + round(1e6 * duration_s)
    counted = [answer for answer in answers if begun_us <= answer.begun_us < until_us]
    return Load.of(counted, duration_s, max(0, round(0.99 * rate * duration_s) - len(counted)))


def _h2load(core: int | None) -> list[str]:
    if shutil.which("h2load") is None:
        raise SystemExit("h2load sends the requests, and is not here; on Debian or Ubuntu: apt install nghttp2-client")
    return ["h2load"] if core is None else ["taskset", "-c", str(core), "h2load"]
