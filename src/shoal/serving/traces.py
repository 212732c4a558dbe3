"""Each request as a span of OpenTelemetry's, within the trace of whoever asked."""

from __future__ import annotations

import time
from typing import Any

from shoal.serving.extra import serve_extra
from shoal.serving.seen import Record

with serve_extra():
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PHASES = (
    ("decode", "began_s", "decoded_s"),
    ("answer", "decoded_s", "answered_s"),
    ("encode", "answered_s", "encoded_s"),
)


class Traces:
    """Spans are made when a request is over, so that it does not wait for them, and sent from a thread of the
    library's: over HTTP, to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says (else to a collector on this machine)."""

    def __init__(self, service: str, processor: SpanProcessor | None = None) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("shoal")
        self._parent = TraceContextTextMapPropagator()

    def record(self, record: Record, ended_s: float) -> None:
        """A request is over; times of ``perf_counter``."""
        ahead_ns = time.time_ns() - time.perf_counter_ns()

        def at(moment_s: float) -> int:
            return int(moment_s * 1e9) + ahead_ns

        carrier = {"traceparent": record.traceparent} if record.traceparent else {}
        span = self._tracer.start_span(
            "infer", self._parent.extract(carrier), trace.SpanKind.SERVER, _attributes(record),
            start_time=at(record.began_s),
        )  # fmt: skip
        within = trace.set_span_in_context(span)
        for name, begun, ended in _PHASES if record.encoded_s else ():
            phase = self._tracer.start_span(name, within, start_time=at(getattr(record, begun)))
            phase.end(at(getattr(record, ended)))
        if record.status >= 500:
            span.set_status(trace.StatusCode.ERROR, record.reason)
        span.end(at(ended_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(record: Record) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "shoal.face": record.face, "http.response.status_code": record.status, "shoal.samples": record.num_samples,
        "shoal.bytes": record.num_bytes,
    }  # fmt: skip
    if record.version is not None:
        attributes["shoal.version"] = record.version
    return attributes
