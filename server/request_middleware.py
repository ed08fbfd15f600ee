"""What happens around every request: id, key, drain, body limit, last-resort errors, counting. Plain ASGI, so that
streams and disconnects pass through untouched."""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.errors import AuthenticationError, LoraplexError, PayloadTooLargeError
from loraplex.server.http_config import HttpConfig
from loraplex.server.http_errors import error_response, public_error, traceback_of
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.metrics import ServerMetrics
from loraplex.server.request_trace import RequestTrace, trace_of
from loraplex.server.request_uploads import is_upload
from loraplex.server.tenant_metrics import CLIENT_GONE
from loraplex.server.tenants import DEFAULT_TENANT, Tenants

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics", "/version", "/ping"})


class RequestMiddleware:
    """Traces a request, lets it in or not, and sees that it ends with an answer."""

    def __init__(
        self, app: ASGIApp, *, config: HttpConfig, tenants: Tenants, lifecycle: Lifecycle, metrics: ServerMetrics
    ) -> None:
        self._app = app
        self._config = config
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tenants = tenants
        self._log = structlog.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = trace_of(scope)

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(message, trace)
            await send(message)

        try:
            await self._serve(scope, trace, self._limited(scope, receive), send_traced)
        except ClientDisconnect:
            trace.status = CLIENT_GONE
        except (Exception, asyncio.CancelledError) as error:
            await self._answer_failure(error, trace, scope, receive, send_traced)
        finally:
            status = trace.status or CLIENT_GONE
            self._metrics.http_request(_endpoint(scope), status, trace.error_type)
            self._metrics.tenants.request_answered(trace.tenant, scope["path"], status, trace.error_type)

    async def _serve(self, scope: Scope, trace: RequestTrace, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN_PATHS:
            trace.tenant = self._tenant(Headers(scope=scope).get("authorization", ""))
        with self._named_in_logs(trace.tenant), self._tracked(scope):
            await self._app(scope, receive, send)

    def _tracked(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        return self._lifecycle.track() if scope["method"] == "POST" else contextlib.nullcontext()

    def _named_in_logs(self, tenant: str | None) -> contextlib.AbstractContextManager[object]:
        if tenant is None or not self._tenants.asks_for_keys:
            return contextlib.nullcontext()
        return structlog.contextvars.bound_contextvars(tenant=tenant)

    def _tenant(self, header: str) -> str:
        if not self._tenants.asks_for_keys:
            return DEFAULT_TENANT
        scheme, _, token = header.partition(" ")
        tenant = self._tenants.of_key(token.strip())
        if scheme.lower() != "bearer" or tenant is None:
            raise AuthenticationError("A known API key is needed, sent as 'Authorization: Bearer KEY'.")
        return tenant

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive``, which refuses to go on once the body is too large. Uploads are limited where they are read."""
        if is_upload(scope):
            return receive
        limit = self._config.max_body_bytes
        announced = Headers(scope=scope).get("content-length", "")
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            if announced.isdecimal() and int(announced) > limit:
                raise _too_large(limit)
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        return receive_limited

    def _add_headers(self, message: Message, trace: RequestTrace) -> None:
        """Before it ends, connections are closed with their answers, so that clients look for another server."""
        trace.status = message["status"]
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = trace.request_id
        headers["openai-processing-ms"] = str(round(trace.elapsed * 1000))
        if self._lifecycle.leaving:
            headers["connection"] = "close"

    async def _answer_failure(
        self, error: BaseException, trace: RequestTrace, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers what nobody else has answered. Being cancelled counts as such once the drain has expired."""
        if isinstance(error, asyncio.CancelledError):
            if not self._lifecycle.expired:
                raise error
            _uncancel()
        elif not isinstance(error, LoraplexError):
            fields = {"tenant": trace.tenant, "path": scope["path"]}
            self._log.error("request_failed", **fields, exception=traceback_of(error))
        public = public_error(error)
        trace.error_type = public.type
        if trace.status is None:
            await error_response(public)(scope, receive, send)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is too large; accepted are at most {limit} bytes.")


def _endpoint(scope: Scope) -> str:
    """The route's pattern, so that ids in paths make no labels of their own."""
    return str(getattr(scope.get("route"), "path", "other"))


def _uncancel() -> None:
    if (task := asyncio.current_task()) is not None:
        task.uncancel()
