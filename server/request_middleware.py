"""What happens around every request: id, key, drain, body limit, last-resort errors, counting. Plain ASGI, so that
streams and disconnects pass through untouched."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.errors import AuthenticationError, LoraplexError, PayloadTooLargeError
from loraplex.server.http_config import HttpConfig
from loraplex.server.http_errors import error_response, public_error, traceback_of
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.metrics import ServerMetrics
from loraplex.server.request_trace import RequestTrace, new_trace
from loraplex.server.request_uploads import is_upload

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics", "/version", "/ping"})
CLIENT_GONE = 499


class RequestMiddleware:
    """Traces a request, lets it in or not, and sees that it ends with an answer."""

    def __init__(self, app: ASGIApp, *, config: HttpConfig, lifecycle: Lifecycle, metrics: ServerMetrics) -> None:
        self._app = app
        self._config = config
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._keys = [key.encode() for key in config.api_keys]
        self._log = structlog.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = new_trace(scope)

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(message, trace)
            await send(message)

        try:
            await self._serve(scope, self._limited(scope, receive), send_traced)
        except ClientDisconnect:
            trace.status = CLIENT_GONE
        except (Exception, asyncio.CancelledError) as error:
            await self._answer_failure(error, trace, scope, receive, send_traced)
        finally:
            self._metrics.http_request(_endpoint(scope), trace.status or CLIENT_GONE, trace.error_type)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["path"] not in OPEN_PATHS:
            self._check_key(Headers(scope=scope).get("authorization", ""))
        with self._tracked(scope):
            await self._app(scope, receive, send)

    def _tracked(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        return self._lifecycle.track() if scope["method"] == "POST" else contextlib.nullcontext()

    def _check_key(self, header: str) -> None:
        scheme, _, token = header.partition(" ")
        given = token.strip().encode()
        known = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise AuthenticationError("A known API key is needed, sent as 'Authorization: Bearer KEY'.")

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
            fields = {"request_id": trace.request_id, "path": scope["path"]}
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
