"""Every error that the clients raise, in one tree: what the server said, or how it could not be heard."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What is known of a failure.

    Attributes:
        message: one sentence: what was wrong.
        status: HTTP status, where there was an answer.
        type: kind of error, as the OpenAI error body names it.
        param: name of the field at fault.
        code: machine-readable code.
        request_id: the server's name for the request; its logs carry it.
        retryable: whether the same call may succeed if it is made again.
        retry_after: seconds that the server asks to be left alone.
        sent: whether the server may have acted on the request.
    """

    message: str
    status: int | None = None
    type: str | None = None
    param: str | None = None
    code: str | None = None
    request_id: str | None = None
    retryable: bool = False
    retry_after: float | None = None
    sent: bool = True


class LoraplexClientError(Exception):
    """Root of all errors of the clients; the properties are those of ``ErrorDetails``."""

    def __init__(self, details: ErrorDetails | str) -> None:
        self.details = ErrorDetails(details) if isinstance(details, str) else details
        super().__init__(self.details)

    def __str__(self) -> str:
        return self.details.message

    @property
    def message(self) -> str:
        return self.details.message

    @property
    def status(self) -> int | None:
        return self.details.status

    @property
    def type(self) -> str | None:
        return self.details.type

    @property
    def param(self) -> str | None:
        return self.details.param

    @property
    def code(self) -> str | None:
        return self.details.code

    @property
    def request_id(self) -> str | None:
        return self.details.request_id

    @property
    def retryable(self) -> bool:
        return self.details.retryable

    @property
    def retry_after(self) -> float | None:
        return self.details.retry_after


class InvalidConfiguration(LoraplexClientError, ValueError):
    """The client cannot be made of these arguments; ``param`` names the one at fault."""


class ConnectionFailed(LoraplexClientError):
    """The server could not be reached, or the connection broke before it had answered."""


class TimedOut(LoraplexClientError):
    """The server was silent for longer than the client's timeout."""


class BadRequest(LoraplexClientError):
    """The request cannot be served as it stands (400, 422, and what has no class of its own below 500)."""


class AuthenticationFailed(LoraplexClientError):
    """No API key, an unknown one, or one that may not do this (401, 403)."""


class NotFound(LoraplexClientError):
    """No such route or object (404)."""


class AdapterNotFound(NotFound):
    """No adapter or model of that name (404)."""


class Conflict(LoraplexClientError):
    """The name is taken, or the object is in use (409)."""


class RequestTooLarge(LoraplexClientError):
    """The body exceeds the server's limit (413)."""


class Overloaded(LoraplexClientError):
    """The server's queue is full (429)."""


class Unavailable(LoraplexClientError):
    """The server is starting, draining, or its engine is being restarted (503)."""


class ServerError(LoraplexClientError):
    """A fault of the server's (5xx but 503)."""


class StreamInterrupted(LoraplexClientError):
    """A stream ended before its answer did: by an error event, a silence, or the loss of the connection.

    The events that came before it are good. It is never retried, since that would repeat them.
    """


class UnexpectedResponse(LoraplexClientError):
    """An answer that this client cannot read: there may be another kind of server at that URL."""


NOT_HEALTHY = (ConnectionFailed, TimedOut, Unavailable, ServerError)
"""What a health check answers with False."""
