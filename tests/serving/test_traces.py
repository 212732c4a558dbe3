"""Each request is a span, within the trace of whoever asked, and goes to a collector."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs shoal[traces]")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shoal.serving.seen import Record, Seen
from shoal.serving.traces import Traces

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_a_request_is_a_span_with_its_phases_in_the_trace_of_who_asked():
    spans = InMemorySpanExporter()
    seen = Seen(traces=Traces("a", SimpleSpanProcessor(spans)))
    now_s = time.perf_counter()
    seen.record(
        Record("http", now_s - 0.03, 200, version=7, num_samples=2, decoded_s=now_s - 0.02, answered_s=now_s - 0.01,
               encoded_s=now_s, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    )  # fmt: skip
    *phases, whole = spans.get_finished_spans()
    assert [span.name for span in phases] == ["decode", "answer", "encode"]
    assert {f"{span.context.trace_id:032x}" for span in (*phases, whole)} == {TRACE}
    assert all(span.parent.span_id == whole.context.span_id for span in phases)
    assert whole.attributes["shoal.version"] == 7 and whole.attributes["shoal.samples"] == 2
    assert [(span.end_time - span.start_time) // 1_000_000 for span in phases] == pytest.approx([10] * 3, abs=1)


def test_a_request_that_fails_is_a_span_with_the_reason():
    spans = InMemorySpanExporter()
    Seen(traces=Traces("a", SimpleSpanProcessor(spans))).record(
        Record("http", time.perf_counter(), 500, reason="ModelFailed")
    )
    (whole,) = spans.get_finished_spans()
    assert not whole.status.is_ok and whole.status.description == "ModelFailed"


@pytest.fixture(name="collector")
def _collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where one listens, and what it got."""
    got: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.path.encode() + self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_spans_are_sent_to_a_collector(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector[0])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    traces = Traces("clothes")
    traces.record(Record("http", time.perf_counter(), 200), time.perf_counter())
    traces.close()
    (got,) = collector[1]
    assert got.startswith(b"/v1/traces") and b"clothes" in got and b"infer" in got
