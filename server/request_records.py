"""What is told of every request: its ids on each line that it logs, a line of its own, and its spans. Plain ASGI, and
the outermost of the middlewares: the ids hold for whatever the others have to say."""

from __future__ import annotations

import structlog
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.access_log import log_request
from loraplex.server.request_middleware import OPEN_PATHS
from loraplex.server.request_trace import RequestTrace, new_trace
from loraplex.server.tenant_metrics import CLIENT_GONE
from loraplex.server.tracing import RequestSpans

TRACEPARENT = "traceparent"


class RequestRecords:
    """Names a request, and tells of it when it is over.

    Args:
        spans: describes the server span; None where nothing is traced.
        access_log: whether to write a line for each request.
    """

    def __init__(self, app: ASGIApp, *, spans: RequestSpans | None, access_log: bool) -> None:
        self._app = app
        self._spans = spans
        self._access_log = access_log
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = new_trace(scope)
        ids = {"request_id": trace.request_id} | self._trace_ids(scope, trace)

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                if trace.traceparent is not None:
                    MutableHeaders(scope=message)[TRACEPARENT] = trace.traceparent
            elif not message.get("more_body", False):
                self._finish_span(scope, trace)  # with the last of the body the server span ends
            await send(message)

        with structlog.contextvars.bound_contextvars(**ids):
            try:
                await self._app(scope, receive, send_recorded)
            finally:
                self._finish_span(scope, trace)
                if self._access_log:
                    quietly = scope["path"] in OPEN_PATHS
                    log_request(scope, trace, trace.status or CLIENT_GONE, quietly=quietly)
                structlog.contextvars.unbind_contextvars("adapter")

    def _trace_ids(self, scope: Scope, trace: RequestTrace) -> dict[str, str]:
        """The trace that the request belongs to: of its server span, or the client's own where nothing is traced."""
        span = get_current_span()
        context = span.get_span_context()
        if self._spans is not None and span.is_recording():
            trace.span = span
        if not context.is_valid:
            context = self._sent_context(scope) or context
        if not context.is_valid:
            return {}
        trace_id, span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        trace.traceparent = f"00-{trace_id}-{span_id}-{context.trace_flags:02x}"
        return {"trace_id": trace_id, "span_id": span_id}

    def _sent_context(self, scope: Scope) -> SpanContext | None:
        sent = Headers(scope=scope).get(TRACEPARENT)
        if sent is None:
            return None
        return get_current_span(self._propagator.extract({TRACEPARENT: sent})).get_span_context()

    def _finish_span(self, scope: Scope, trace: RequestTrace) -> None:
        if self._spans is not None and trace.span is not None:
            self._spans.finish(trace, scope.get("query_string", b""))
            trace.span = None
