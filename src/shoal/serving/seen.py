"""What is seen of a server: Prometheus metrics, and a line a request."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from shoal.errors import ConfigError
from shoal.serving.codec import Question

_LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Record(msgspec.Struct):
    """One request, as it goes on: when each phase of it was over. Times of ``perf_counter``."""

    face: str
    began_s: float
    status: int = 0
    reason: str = ""
    id: str | None = None
    version: int | None = None
    num_bytes: int = 0
    num_samples: int = 0
    decoded_s: float = 0.0
    answered_s: float = 0.0
    encoded_s: float = 0.0
    traceparent: str = ""
    """Of whoever asked: which trace this is within."""

    def asked(self, num_bytes: int, question: Question) -> None:
        """Its body has come, and is a question."""
        self.decoded_s = time.perf_counter()
        self.num_bytes, self.id, self.num_samples = num_bytes, question.id, question.num_samples

    def answered(self, version: int) -> None:
        self.answered_s, self.version = time.perf_counter(), version

    def encoded(self) -> None:
        self.encoded_s = time.perf_counter()


class AccessLog:
    """A JSON object a line, for each request. ``ConfigError`` if the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: standard error."""
        try:
            self._fd = 2 if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise ConfigError(f"the access log {path} cannot be written: {error}") from error
        self.num_lost = 0

    def write(self, record: Record, took_s: float) -> None:
        line: dict[str, Any] = {
            "at_s": round(time.time(), 3), "face": record.face, "status": record.status, "ms": round(took_s * 1e3, 3),
            "version": record.version, "samples": record.num_samples, "bytes": record.num_bytes,
        }  # fmt: skip
        line |= {"id": record.id} if record.id else {}
        line |= {"reason": record.reason} if record.reason else {}
        try:
            os.write(self._fd, msgspec.json.encode(line) + b"\n")
        except OSError:
            self.num_lost += 1


class Records(Protocol):
    """What else is told of each request, such as ``Traces``."""

    def record(self, record: Record, ended_s: float) -> None: ...


_PHASES = ("decode", "answer", "encode", "all")
_MOST_UNCOUNTED = 1_000


class _Answered(Collector):
    """Requests that were answered, counted many at once: one by one that would cost a tenth of what they do.
    ``count``: told how many had this face and version, and their samples."""

    def __init__(self, count: Callable[[str, int | None, int, int], object]) -> None:
        self._count = count
        self._uncounted: list[tuple[Record, float]] = []
        self._counts = np.zeros((len(_PHASES), len(_LATENCY_S) + 1), np.int64)
        """Those of each phase that took up to each bound, and longer than the last."""
        self._sums_s = np.zeros(len(_PHASES))

    def add(self, record: Record, ended_s: float) -> None:
        self._uncounted.append((record, ended_s))
        if len(self._uncounted) >= _MOST_UNCOUNTED:
            self._fold()

    def _fold(self) -> None:
        many, self._uncounted = self._uncounted, []
        if not many:
            return
        times = np.array([(r.began_s, r.decoded_s, r.answered_s, r.encoded_s, ended_s) for r, ended_s in many])
        took_s = np.column_stack([np.diff(times[:, :4]), times[:, 4] - times[:, 0]])
        for counts, column in zip(self._counts, np.searchsorted(_LATENCY_S, took_s).T, strict=True):
            counts += np.bincount(column, minlength=len(counts))
        self._sums_s += took_s.sum(0)
        totals: dict[tuple[str, int | None], tuple[int, int]] = {}
        for record, _ in many:
            num, num_samples = totals.get((record.face, record.version), (0, 0))
            totals[record.face, record.version] = num + 1, num_samples + record.num_samples
        for (face, version), (num, num_samples) in totals.items():
            self._count(face, version, num, num_samples)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        self._fold()
        about = "Of answered requests: read and decoded; waiting and computed; encoded"
        family = HistogramMetricFamily("shoal_phase_seconds", about, labels=["phase"])
        bounds = [*(str(float(bound)) for bound in _LATENCY_S), "+Inf"]
        for phase, counts, sum_s in zip(_PHASES, self._counts, self._sums_s, strict=True):
            family.add_metric([phase], list(zip(bounds, counts.cumsum().tolist(), strict=True)), float(sum_s))
        yield family


@dataclass
class Seen:
    """One server's metrics. ``log``: where each request has its line, if anywhere. ``traces``: where its span goes."""

    log: AccessLog | None = None
    traces: Records | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        self._answered = _Answered(self._count)
        registry.register(self._answered)  # first, so that what it has yet to count is in those below
        self.requests = Counter("shoal_requests", "Requests", ["face", "status"], registry=registry)
        self.refused = Counter("shoal_refused", "Requests that were not answered", ["reason"], registry=registry)
        self.samples = Counter("shoal_samples", "Samples that were answered for", ["version"], registry=registry)
        self.batch = Histogram("shoal_batch_samples", "Samples in a batch", buckets=_SAMPLES, registry=registry)
        self.compute_s = Histogram("shoal_batch_seconds", "Of a batch", buckets=_LATENCY_S, registry=registry)
        self.waiting = Gauge("shoal_waiting_requests", "Requests that wait for the model", registry=registry)
        self.version = Gauge("shoal_model_version", "The version that answers", registry=registry)
        self.age_s = Gauge("shoal_model_age_seconds", "Since that version was stored", registry=registry)
        self.decisions = Counter("shoal_decisions", "Of the roll-out", ["kind"], registry=registry)

    def record(self, record: Record) -> None:
        """A request is over."""
        now_s = time.perf_counter()
        if record.encoded_s:
            self._answered.add(record, now_s)
        else:
            self.requests.labels(record.face, str(record.status)).inc()
            self.refused.labels(record.reason or "Gone").inc()
        if self.log is not None:
            self.log.write(record, now_s - record.began_s)
        if self.traces is not None:
            self.traces.record(record, now_s)

    def _count(self, face: str, version: int | None, num: int, num_samples: int) -> None:
        self.requests.labels(face, "200").inc(num)
        self.samples.labels(version).inc(num_samples)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
