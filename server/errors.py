"""Every error that Loraplex raises for its users, in one tree with one mapping to HTTP.

The engine process and the HTTP process share this file: an error crosses the socket as an ``ErrorInfo`` (see
``messages.py``) and is raised again on the other side as the same class.
"""

from __future__ import annotations

from typing import ClassVar

from loraplex.server.span_times import FailTimes


class LoraplexError(Exception):
    """Root of all errors meant for users.

    Args:
        message: one sentence: what was wrong, and what is accepted.
        param: name of the request field or tensor key at fault, where there is one.
        code: machine-readable code of the OpenAI error body, where there is one.

    Attributes:
        times: of the engine's, where a request failed there.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.times: FailTimes | None = None


class InvalidRequestError(LoraplexError):
    """The request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt can never fit: into the model's context, or into the pool."""

    default_code = "context_length_exceeded"


class AdapterInvalidError(InvalidRequestError):
    """An adapter folder breaks a rule; ``param`` is the tensor key, configuration key or file at fault."""

    default_code = "adapter_invalid"


class AdapterTooLargeError(AdapterInvalidError):
    """An adapter needs more than the pool or the host store can ever hold."""

    default_code = "adapter_too_large"


class AuthenticationError(LoraplexError):
    """No API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class ModelNotFoundError(LoraplexError):
    """No base model or adapter of that name."""

    status = 404
    type = "not_found_error"
    default_code = "model_not_found"


class NotFoundError(LoraplexError):
    """No such route or object."""

    status = 404
    type = "not_found_error"


class MethodNotAllowedError(LoraplexError):
    """The route exists, but not for this HTTP method."""

    status = 405
    type = "invalid_request_error"


class ConflictError(LoraplexError):
    """The name is taken, or the object is in use."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PayloadTooLargeError(LoraplexError):
    """The body exceeds the server's limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class OverloadedError(LoraplexError):
    """The queue is full."""

    status = 429
    type = "overloaded_error"
    default_code = "overloaded"
    retryable = True


class UnavailableError(LoraplexError):
    """The server is starting, draining, or its engine is being restarted."""

    status = 503
    type = "overloaded_error"
    default_code = "unavailable"
    retryable = True


class EngineError(LoraplexError):
    """A fault of ours inside the engine; the request is over, the server goes on."""

    default_code = "engine_error"


class EngineStartError(InvalidRequestError):
    """The engine cannot start with these settings; ``param`` names the one at fault."""

    default_code = "engine_start"


def _all_errors(root: type[LoraplexError]) -> dict[str, type[LoraplexError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _all_errors(child)
    return found


ERRORS_BY_NAME: dict[str, type[LoraplexError]] = _all_errors(LoraplexError)
