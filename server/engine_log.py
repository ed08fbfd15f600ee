"""What the engine writes of requests and adapters, at level debug; below it, nothing is gathered for that."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from loraplex.server.messages import AdapterRef, Generate, RequestFailed, TokenOutput
from loraplex.server.span_times import short_identity

MOST_IDS = 50
"""So many requests are named in one line."""

_log = structlog.get_logger(__name__)


def is_debugging() -> bool:
    """Whether lines of level debug are written."""
    return logging.getLogger(__name__).isEnabledFor(logging.DEBUG)


def debug(event: str, **fields: Any) -> None:
    """Write a line of level debug."""
    if is_debugging():
        _log.debug(event, **fields)


def adapter_fields(names: list[str]) -> dict[str, Any]:
    """One adapter as its name, several as a list."""
    return {} if not names else {"adapter": names[0] if len(names) == 1 else names}


def origins(failed: Iterable[RequestFailed]) -> list[str]:
    """What logs call these requests, each once, and not too many of them."""
    return list(dict.fromkeys(one.origin for one in failed if one.origin))[:MOST_IDS]


def adapter_failed(ref: AdapterRef, reason: str) -> None:
    """A load has failed."""
    _log.warning("an adapter could not be loaded", adapter=ref.name, reason=reason)


@dataclass(slots=True)
class _Open:
    """A request that is not over: the fields of its lines, and its choices that go on."""

    fields: dict[str, Any]
    choices: set[int]


@dataclass(slots=True)
class RequestLog:
    """Follows requests through the engine. Call it only where ``is_on``."""

    is_on: bool = field(default_factory=is_debugging)
    _open: dict[str, _Open] = field(default_factory=dict)

    def taken(self, command: Generate) -> None:
        """A request came."""
        names = [part.adapter.name for part in command.mix] if command.adapter is None else [command.adapter.name]
        fields = {"request_id": command.origin, "engine_id": command.request_id} | adapter_fields(names)
        self._open[command.request_id] = _Open(fields, set(range(command.n)))
        _log.debug("a request came", **fields, prompt_tokens=len(command.prompt_ids), choices=command.n)

    def aborted(self, request_id: str, index: int | None) -> None:
        """A request, or one choice of it, was given up."""
        found = self._open.get(request_id)
        if found is not None:
            _log.debug("a request was given up", **found.fields, choice=index)
            self._end(request_id, found, found.choices if index is None else {index})

    def told(self, outputs: Iterable[TokenOutput], failed: Iterable[RequestFailed]) -> None:
        """A step has this to say."""
        for output in outputs:
            found = self._open.get(output.request_id)
            if found is None:
                continue
            if output.began is not None:
                identities = [short_identity(use.identity) for use in output.began.adapters]
                waited = output.began.scheduled - output.began.arrived
                fields: dict[str, Any] = {"queue_ms": round(waited * 1000, 1), "cached_tokens": output.cached_tokens}
                _log.debug("a request has its first token", **found.fields, **fields, adapter_identities=identities)
            if output.over is not None:
                end = {"finish_reason": output.finish_reason, "preemptions": len(output.over.preempted)}
                _log.debug("a choice is over", **found.fields, choice=output.index, **end)
                self._end(output.request_id, found, {output.index})
        for failure in failed:
            fields = {"request_id": failure.origin, "engine_id": failure.request_id}
            _log.debug("a request failed", **fields, error=failure.error.message, code=failure.error.code)
            self._open.pop(failure.request_id, None)

    def _end(self, request_id: str, found: _Open, choices: set[int]) -> None:
        found.choices = found.choices - choices
        if not found.choices:
            self._open.pop(request_id, None)
