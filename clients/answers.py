"""Bodies of answers to typed results. A body of another shape raises KeyError, TypeError or ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import httpx2

from loraplex.clients.types import Adapter, Choice, Completion, Json, Model, Page, RouterRun, StreamEvent, Usage

REQUEST_ID_HEADER = "x-request-id"

T = TypeVar("T")


def completion(response: httpx2.Response) -> Completion:
    """Answer of ``POST /v1/completions``."""
    return _whole(response, lambda choice: choice["text"])


def chat_completion(response: httpx2.Response) -> Completion:
    """Answer of ``POST /v1/chat/completions``."""
    return _whole(response, lambda choice: choice["message"]["content"] or "")


def completion_chunk(chunk: Json) -> StreamEvent:
    """An event of a streamed completion."""
    return _piece(chunk, lambda choice: choice["text"])


def chat_chunk(chunk: Json) -> StreamEvent:
    """An event of a streamed chat."""
    return _piece(chunk, lambda choice: choice["delta"].get("content") or "")


def page_of(read: Callable[[Json], T], key: str) -> Callable[[httpx2.Response], Page[T]]:
    """Reads a page of a list; the next one begins after the last item's ``key``."""

    def page(response: httpx2.Response) -> Page[T]:
        body = response.json()
        data = body["data"]
        after = data[-1][key] if data and body.get("has_more") else None
        return Page(tuple(read(item) for item in data), after)

    return page


def adapter(response: httpx2.Response) -> Adapter:
    """Answer of ``GET /v1/adapters/{id}``."""
    return adapter_object(response.json())


def adapter_object(item: Json) -> Adapter:
    """An adapter of a list."""
    targets = item.get("targets")
    error = item.get("error")
    return Adapter(
        name=item["id"],
        path=item["path"],
        parent=item.get("parent"),
        created=item.get("created"),
        revision=item.get("revision"),
        tier=item.get("tier"),
        state=item.get("state"),
        error=None if error is None else error["message"],
        source=item.get("source"),
        pinned=bool(item.get("pinned")),
        tags=tuple(item.get("tags") or ()),
        identity=item.get("identity"),
        kind=item.get("kind"),
        rank=item.get("rank"),
        num_experts=item.get("num_experts"),
        targets=None if targets is None else tuple(targets),
        bytes=item.get("bytes"),
        pages=item.get("pages"),
        running=item.get("running") or 0,
        warnings=tuple(item.get("warnings") or ()),
        raw=item,
    )


def model_object(item: Json) -> Model:
    """A model of a list."""
    return Model(
        id=item["id"],
        created=item["created"],
        root=item.get("root"),
        parent=item.get("parent"),
        max_model_len=item.get("max_model_len"),
        kind=item.get("kind"),
        num_experts=item.get("num_experts"),
        raw=item,
    )


def version_text(response: httpx2.Response) -> str:
    """Answer of ``GET /version``."""
    return str(response.json()["version"])


def nothing(response: httpx2.Response) -> None:
    """For answers whose status says it all."""


def _whole(response: httpx2.Response, text_of: Callable[[Any], str]) -> Completion:
    body = response.json()
    choices = [_choice(choice, text_of) for choice in body["choices"]]
    if not choices:
        raise ValueError("no choices")
    return Completion(
        id=body["id"],
        model=body["model"],
        choices=tuple(sorted(choices, key=lambda choice: choice.index)),
        usage=_usage(body.get("usage")),
        request_id=response.headers.get(REQUEST_ID_HEADER),
        raw=body,
    )


def _choice(choice: Json, text_of: Callable[[Any], str]) -> Choice:
    routing = tuple(_run(run) for run in choice.get("routing") or ())
    return Choice(choice["index"], text_of(choice), choice.get("finish_reason"), choice.get("logprobs"), routing)


def _run(run: Json) -> RouterRun:
    return RouterRun(
        adapter=run["adapter"],
        layer=run["layer"],
        site=run["site"],
        start=run["start"],
        experts=tuple(map(tuple, run["experts"])),
        weights=tuple(map(tuple, run["weights"])),
    )


def _piece(chunk: Json, text_of: Callable[[Any], str]) -> StreamEvent:
    usage = _usage(chunk.get("usage"))
    if not chunk["choices"]:
        return StreamEvent("", None, usage=usage, raw=chunk)
    piece = _choice(chunk["choices"][0], text_of)
    return StreamEvent(piece.text, piece.index, piece.finish_reason, piece.logprobs, piece.routing, usage, chunk)


def _usage(usage: Any) -> Usage | None:
    if usage is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0)
