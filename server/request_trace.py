"""What is known of a request while it is served: its id, when it came, and how it fails."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field

from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.types import Scope

from loraplex.server.generation_record import GenerationRecord

TRACE_KEY = "loraplex.trace"
ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class RequestTrace:
    """One request. ``error_type`` is set by whoever answers it with an error, ``tenant`` once its key is known.

    Attributes:
        span: of the server, while it records and has not ended.
        traceparent: for the answer: names the server's span, or the client's own where nothing is traced.
        generation: what it generates, once the engine is to begin.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    error_type: str | None = None
    status: int | None = None
    tenant: str | None = None
    span: Span | None = None
    traceparent: str | None = None
    generation: GenerationRecord | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started


def new_trace(scope: Scope) -> RequestTrace:
    """A trace for a request that just came, under the client's own id where it sent a fit one."""
    sent = Headers(scope=scope).get("x-request-id", "")
    request_id = sent if ACCEPTED_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
    trace = scope[TRACE_KEY] = RequestTrace(request_id)
    return trace


def trace_of(scope: Scope) -> RequestTrace:
    """The request's trace."""
    trace: RequestTrace = scope[TRACE_KEY]
    return trace
