"""Promise: where a collector is named, a request is a span of the caller's trace and its phases are spans within."""

import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from test_serve import Server
from tiny_model import encoded

from service import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP on a free port; `spans` are those that have arrived."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        entry.value.string_value
                        for entry in resource.resource.attributes
                        if entry.key == "service.name"
                    }
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="OpenTelemetry's exporter is not installed")
    collector = Collector()
    yield collector
    collector.server.shutdown()


def test_a_request_is_a_span_of_the_callers_trace_with_its_phases_within(collector: Collector, model_file: Any) -> None:
    server = Server(model_file, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "chosen"}
    try:
        picture = encoded(np.zeros((8, 8, 3), np.uint8))
        assert httpx.post(f"{server.url}/segment", content=picture, headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200
    finally:
        assert server.stop() == 0
    assert collector.services == {"encnet-serve"}
    (request,) = [span for span in collector.spans if span.parent_span_id.hex() == PARENT]
    assert request.trace_id.hex() == TRACE
    assert {"encnet.request_id": "chosen"}.items() <= {
        entry.key: entry.value.string_value for entry in request.attributes
    }.items()
    phases = [span for span in collector.spans if span.parent_span_id == request.span_id]
    assert [span.name for span in sorted(phases, key=lambda span: span.start_time_unix_nano)] == [
        "decode",
        "queue",
        "infer",
        "encode",
    ]
    assert sum(span.end_time_unix_nano - span.start_time_unix_nano for span in phases) <= (
        request.end_time_unix_nano - request.start_time_unix_nano
    )
    assert len(collector.spans) == 5, "probes are not traced"


def test_missing_packages_are_one_logged_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with caplog.at_level(logging.WARNING):
        tracing.instrument(FastAPI())
        tracing.record_phases({"decode": 1.0})
    (line,) = caplog.messages
    assert "nothing is traced" in line
    assert tracing.REQUIREMENTS in line
