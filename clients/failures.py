"""Failed answers and failed connections to errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2

from loraplex.clients.answers import REQUEST_ID_HEADER
from loraplex.clients.calls import Call
from loraplex.clients.errors import (
    AdapterNotFound,
    AuthenticationFailed,
    BadRequest,
    Conflict,
    ConnectionFailed,
    ErrorDetails,
    LoraplexClientError,
    NotFound,
    Overloaded,
    RequestTooLarge,
    ServerError,
    TimedOut,
    Unavailable,
    UnexpectedResponse,
)
from loraplex.clients.retries import asks_for_retry, retry_after_seconds

T = TypeVar("T")

_BY_STATUS: dict[int, type[LoraplexClientError]] = {
    401: AuthenticationFailed,
    403: AuthenticationFailed,
    404: NotFound,
    409: Conflict,
    413: RequestTooLarge,
    429: Overloaded,
    503: Unavailable,
}
_REFUSED = frozenset({429, 503})
"""Statuses of requests that the server did not act on."""
_SHOWN_CHARACTERS = 200


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turns failures to reach the server into ours."""
    try:
        yield
    except httpx2.RequestError as error:
        raise _connection_error(error) from error


def failed_answer(response: httpx2.Response) -> LoraplexClientError:
    """The error that an answer tells of; its body must have been read."""
    told = error_fields(_json_or_none(response))
    code = text_or_none(told.get("code"))
    status = response.status_code
    details = ErrorDetails(
        message=text_or_none(told.get("message")) or _describe(response),
        status=status,
        type=text_or_none(told.get("type")),
        param=text_or_none(told.get("param")),
        code=code,
        request_id=response.headers.get(REQUEST_ID_HEADER),
        retryable=asks_for_retry(status, response.headers),
        retry_after=retry_after_seconds(response.headers),
        sent=status not in _REFUSED,
    )
    return _class_of(status, code)(details)


def read_answer(call: Call[T], response: httpx2.Response) -> T:
    """The result of a call; UnexpectedResponse if the body is of another shape."""
    try:
        return call.read(response)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unreadable(response, _describe(response)) from error


def unreadable(response: httpx2.Response, what: str) -> UnexpectedResponse:
    """The error for an answer that is no failure but cannot be read."""
    return UnexpectedResponse(
        ErrorDetails(
            f"{what}; is there a Loraplex server at that URL?",
            status=response.status_code,
            request_id=response.headers.get(REQUEST_ID_HEADER),
        )
    )


def error_fields(body: Any) -> dict[str, Any]:
    """The error that a body or an event tells of; empty if it tells of none."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else {}


def text_or_none(value: Any) -> str | None:
    """A field of an error as text; some servers send codes as numbers."""
    return None if value is None or value == "" else str(value)


def origin(request: httpx2.Request) -> str:
    """The server that a request went to."""
    return f"{request.url.scheme}://{request.url.netloc.decode('ascii')}"


def _connection_error(error: httpx2.RequestError) -> LoraplexClientError:
    server = origin(error.request)
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return TimedOut(ErrorDetails(f"{server} could not be reached in time", retryable=True, sent=False))
    if isinstance(error, httpx2.TimeoutException):
        return TimedOut(ErrorDetails(f"{server} did not answer in time"))
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return ConnectionFailed(ErrorDetails(f"{server} cannot be reached: {reason}", retryable=True, sent=False))
    if isinstance(error, httpx2.TransportError):
        return ConnectionFailed(ErrorDetails(f"the connection to {server} broke: {reason}", retryable=True))
    return UnexpectedResponse(f"the answer of {server} cannot be read: {reason}")


def _class_of(status: int, code: str | None) -> type[LoraplexClientError]:
    if status == 404 and code == "model_not_found":
        return AdapterNotFound
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return ServerError
    return BadRequest if status >= 400 else UnexpectedResponse


def _describe(response: httpx2.Response) -> str:
    request = response.request
    shown = response.text[:_SHOWN_CHARACTERS]
    return f"{request.method} {origin(request)}{request.url.path} answered {response.status_code} with {shown!r}"


def _json_or_none(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
