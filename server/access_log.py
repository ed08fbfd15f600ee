"""One line of the log for every request: how it was answered, how long it took, and what it generated."""

from __future__ import annotations

from typing import Any

import structlog
from starlette.types import Scope

from loraplex.server.generation_record import GenerationRecord
from loraplex.server.request_trace import RequestTrace
from loraplex.server.span_times import short_identity

_log = structlog.get_logger(__name__)


def log_request(scope: Scope, trace: RequestTrace, status: int, *, quietly: bool) -> None:
    """Write the line; ``quietly`` is for probes, which nobody wants to read of.

    The ids, the tenant and the adapter are of the context that the request is answered in.
    """
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": _ms(trace.elapsed),
    }
    if trace.tenant is not None:
        fields["tenant"] = trace.tenant
    if trace.error_type is not None:
        fields["error_type"] = trace.error_type
    if trace.generation is not None:
        fields |= _generation_fields(trace.generation)
    (_log.debug if quietly else _log.info)("request", **fields)


def _generation_fields(record: GenerationRecord) -> dict[str, Any]:
    generation, timing = record.generation, record.generation.timing
    first = None if timing.first_token is None else timing.time_to_first_token
    fields: dict[str, Any] = {
        "stream": record.stream,
        "outcome": generation.outcome,
        "finish_reason": ",".join(sorted(set(generation.finish_reasons))) or None,
        "prompt_tokens": generation.job.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "cached_tokens": generation.cached_tokens,
        "queue_ms": _ms(timing.queue_seconds),
        "adapter_load_ms": _ms(timing.adapter_load_seconds),
        "ttft_ms": _ms(first),
    }
    if identities := [short_identity(use.identity) for use in record.uses]:
        fields["adapter_identity"] = identities[0] if len(identities) == 1 else identities
    return fields


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
