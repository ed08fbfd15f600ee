"""Errors as bodies: ``{"error": {"message", "type", "param", "code"}}``, all four keys always."""

from __future__ import annotations

import asyncio
import http
import traceback
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.errors import (
    AuthenticationError,
    EngineError,
    InvalidRequestError,
    LoraplexError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
)
from loraplex.server.lifecycle import stopping_error
from loraplex.server.request_body import invalid_request
from loraplex.server.request_trace import trace_of

RETRY_AFTER_SECONDS = 1
RETRIED_BY_CLIENTS = frozenset({408, 409, 429})


def public_error(error: BaseException) -> LoraplexError:
    """What a client may know of an error: nothing, unless it was meant for users."""
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return stopping_error()
    return EngineError("The server failed to answer this request.", code="internal_error")


def traceback_of(error: BaseException) -> str:
    """The traceback for the log: source lines only, never the values of variables, which may be secrets."""
    return "".join(traceback.format_exception(error))


def error_body(error: LoraplexError) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: LoraplexError, extra_headers: dict[str, str] | None = None) -> Response:
    """The answer to a request that failed."""
    return Response(
        orjson.dumps(error_body(error)),
        status_code=error.status,
        headers=error_headers(error) | (extra_headers or {}),
        media_type="application/json",
    )


def error_headers(error: LoraplexError) -> dict[str, str]:
    """Tells clients that retry by themselves whether it is of use."""
    if error.retryable:
        return {"retry-after": str(RETRY_AFTER_SECONDS)}
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    if error.status in RETRIED_BY_CLIENTS or error.status >= 500:
        return {"x-should-retry": "false"}
    return {}


async def on_loraplex_error(request: Request, error: Exception) -> Response:
    """Answers an error of ours."""
    public = public_error(error)
    trace_of(request.scope).error_type = public.type
    return error_response(public)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers what the framework refuses: no such route, wrong method, too large."""
    assert isinstance(error, HTTPException)
    public = _of_status(error.status_code, request)
    trace_of(request.scope).error_type = public.type
    return error_response(public, dict(error.headers or {}))


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answers parameters that the framework found wrong."""
    assert isinstance(error, RequestValidationError)
    faults = [fault | {"loc": tuple(fault["loc"])[1:]} for fault in error.errors()]
    public = invalid_request(faults)
    trace_of(request.scope).error_type = public.type
    return error_response(public)


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error that the app can raise its OpenAI-shaped body."""
    app.add_exception_handler(LoraplexError, on_loraplex_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def _of_status(status: int, request: Request) -> LoraplexError:
    if status == 404:
        return NotFoundError(f"There is no route {request.method} {request.url.path}.", code="not_found")
    if status == 405:
        return MethodNotAllowedError(
            f"{request.url.path} does not answer to {request.method}.", code="method_not_allowed"
        )
    if status == 413:
        return PayloadTooLargeError("The request body is too large.")
    if status < 500:
        return InvalidRequestError(f"The request was refused: {http.HTTPStatus(status).phrase}.")
    return EngineError("The server failed to answer this request.", code="internal_error")
