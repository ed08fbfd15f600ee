"""A server whose traces go to a collector of these tests, and whose log is JSON at its most talkative."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

KEY = "sk-a-key-that-nobody-may-read"


def value_of(value: Any) -> Any:
    """An attribute's value in Python."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


class Seen:
    """A span that the collector got."""

    def __init__(self, span: Span, service: str) -> None:
        self.name, self.service = span.name, service
        self.trace_id, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.start, self.end = span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9
        self.attributes = {one.key: value_of(one.value) for one in span.attributes}
        self.events = {event.name: event.time_unix_nano / 1e9 for event in span.events}
        self.is_error = span.status.code == 2
        self.is_server = span.kind == Span.SPAN_KIND_SERVER

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Collector:
    """The least that speaks OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = {one.key: value_of(one.value) for one in resource.resource.attributes}
            found = [span for scope in resource.scope_spans for span in scope.spans]
            self.spans += [Seen(span, facts["service.name"]) for span in found]

    def of_trace(self, trace_id: str) -> list[Seen]:
        return [span for span in list(self.spans) if span.trace_id == trace_id]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def observed(start_server: Callable[..., Any], collector: Collector) -> Iterator[Any]:
    """The server. Tests leave it as they found it; those that end it come last."""
    server = start_server(
        *("demo", "--log-format", "json", "--log-level", "debug", "--otlp-endpoint", collector.url),
        *("--api-keys", KEY, "--threads", "1"),
        env={"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_SERVICE_NAME": "observed"},
        key=KEY,
    )
    yield server.wait_until_ready()
    if server.is_alive:
        assert server.stop() == 0


@pytest.fixture
def lines_of() -> Callable[[Any], list[dict[str, Any]]]:
    """The JSON lines of a server's log; beside them it holds the greeting alone."""

    def read(server: Any) -> list[dict[str, Any]]:
        lines = [line for line in server.log.splitlines() if line.startswith("{")]
        others = [line for line in server.log.splitlines() if line and not line.startswith("{")]
        assert len(others) == 2, others
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def spans_of(collector: Collector, wait_until: Callable[..., bool]) -> Callable[..., list[Seen]]:
    """The spans of a trace, the server's first and the others in order, once the server's has come."""

    def find(trace_id: str) -> list[Seen]:
        assert wait_until(lambda: any(span.is_server for span in collector.of_trace(trace_id))), "no server span came"
        return sorted(collector.of_trace(trace_id), key=lambda span: (not span.is_server, span.start))

    return find
