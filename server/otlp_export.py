"""Sends spans to a collector, by OTLP over HTTP: in batches, from a thread, out of a bounded queue.

OpenTelemetry's own environment variables say the rest: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER
(by default what the caller decided, else all), OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_* and so on. A collector that is
away costs a warning now and then: what does not fit into the queue is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from importlib.metadata import version

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from loraplex.server.tracing import Tracing

_log = structlog.get_logger(__name__)
_TRACES_PATH = "/v1/traces"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NOISY = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
_QUIET_SECONDS = 60.0


class RareWarnings(logging.Filter):
    """Lets a record pass now and then, as a warning that tells how many were withheld. Shared by several loggers."""

    def __init__(self, seconds: float = _QUIET_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._passed_at: float | None = None
        self._withheld = 0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            now = time.monotonic()
            if self._passed_at is not None and now - self._passed_at < self._seconds:
                self._withheld += 1
                return False
            self._passed_at, withheld, self._withheld = now, self._withheld, 0
        record.msg = f"traces cannot be sent: {record.getMessage()}" + (f" ({withheld} more)" if withheld else "")
        record.args = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


def open_tracing(endpoint: str | None) -> Tracing:
    """Begin to send spans; ``endpoint`` is the address of a collector, None where the environment names one."""
    for name in _PROTOCOLS:
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            _log.warning("traces are sent as http/protobuf, whatever a variable says", variable=name)
    quiet = RareWarnings()
    for name in _NOISY:
        logging.getLogger(name).addFilter(quiet)
    own = Resource({"service.name": "loraplex", "service.version": version("loraplex")})
    provider = TracerProvider(
        resource=Resource.create().merge(own).merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=_traces_url(endpoint))))

    async def close(seconds: float) -> None:
        # In a thread that nobody waits for: a collector that hangs must not keep the server from ending.
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop may have gone
                loop.call_soon_threadsafe(over.set)

        threading.Thread(target=end, name="last traces", daemon=True).start()
        try:
            await asyncio.wait_for(over.wait(), seconds)
        except TimeoutError:
            _log.warning("the last traces could not be sent in time", seconds=round(seconds, 1))
        for name in _NOISY:
            logging.getLogger(name).removeFilter(quiet)

    return Tracing(provider, close)


def _traces_url(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    url = endpoint.rstrip("/")
    return url if url.endswith(_TRACES_PATH) else url + _TRACES_PATH
