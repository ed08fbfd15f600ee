"""What each method of the clients asks of the server, and how its answer is read: the same for both clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx2

from loraplex.clients import answers
from loraplex.clients.adapter_options import (
    ChangeOptions,
    ListOptions,
    LoadOptions,
    change_fields,
    list_params,
    load_fields,
    upload_files,
    upload_form,
)
from loraplex.clients.options import AdapterId, CompletionOptions, GenerationOptions, chat_body, completion_body
from loraplex.clients.types import Adapter, Completion, Json, Model, Page, StreamEvent

T = TypeVar("T")

Repeat = Literal["always", "unless_sent", "never"]
"""When a call may be made again: whatever became of it, only if the server cannot have acted on it, or not at all."""

HEALTH_SECONDS = 5.0
PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request.

    Attributes:
        path: below the server's URL, quoted.
        body: sent as JSON.
        form: sent as a form, with the files.
        files: on this machine, by the names of their parts; read while they are sent.
        timeout: seconds, where it is to be shorter than the client's.
    """

    method: str
    path: str
    body: Json | None = None
    form: Mapping[str, str] | None = None
    files: Mapping[str, Path] | None = None
    params: Mapping[str, str | int] | None = None
    repeat: Repeat = "always"
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how its answer is read."""

    ask: Ask
    read: Callable[[httpx2.Response], T]


@dataclass(frozen=True, slots=True)
class StreamCall:
    """A request that is answered by events, and how each is read."""

    ask: Ask
    read: Callable[[Json], StreamEvent]


def complete(prompt: str | Sequence[int], adapter_id: AdapterId | None, options: CompletionOptions) -> Call[Completion]:
    """``Client.generate``."""
    body = completion_body(prompt, adapter_id, options)
    return Call(Ask(method="POST", path="/v1/completions", body=body), answers.completion)


def chat(
    messages: Sequence[Mapping[str, Any]], adapter_id: AdapterId | None, options: GenerationOptions
) -> Call[Completion]:
    """``Client.chat``."""
    body = chat_body(messages, adapter_id, options)
    return Call(Ask(method="POST", path="/v1/chat/completions", body=body), answers.chat_completion)


def stream_completion(
    prompt: str | Sequence[int], adapter_id: AdapterId | None, options: CompletionOptions
) -> StreamCall:
    """``Client.stream``: as ``generate``, with the usage at the end."""
    return StreamCall(_streamed(complete(prompt, adapter_id, options).ask), answers.completion_chunk)


def stream_chat(
    messages: Sequence[Mapping[str, Any]], adapter_id: AdapterId | None, options: GenerationOptions
) -> StreamCall:
    """``Client.stream_chat``: as ``chat``, with the usage at the end."""
    return StreamCall(_streamed(chat(messages, adapter_id, options).ask), answers.chat_chunk)


def load_adapter(name: str, path: str, options: LoadOptions) -> Call[Adapter]:
    """Loading the same name and path again does no harm, so that this may be repeated."""
    body = {"id": name, "path": path, **load_fields(options)}
    return Call(Ask(method="POST", path="/v1/adapters", body=body), answers.adapter)


def upload_adapter(name: str, path: str | PathLike[str], options: LoadOptions) -> Call[Adapter]:
    """Sending the same files again does no harm, either."""
    form = {"id": name, **upload_form(options)}
    return Call(Ask(method="POST", path="/v1/adapters", form=form, files=upload_files(path)), answers.adapter)


def change_adapter(name: str, options: ChangeOptions) -> Call[Adapter]:
    """``Client.change_adapter``."""
    return Call(Ask(method="PATCH", path=_adapter_path(name), body=change_fields(options)), answers.adapter)


def pin_adapter(name: str, *, pinned: bool) -> Call[Adapter]:
    """``Client.pin_adapter`` and ``unpin_adapter``."""
    return Call(Ask(method="POST", path=f"{_adapter_path(name)}/{'pin' if pinned else 'unpin'}"), answers.adapter)


def prefetch_adapter(name: str, tier: str) -> Call[Adapter]:
    """``Client.prefetch_adapter``."""
    return Call(Ask(method="POST", path=f"{_adapter_path(name)}/prefetch", body={"tier": tier}), answers.adapter)


def unload_adapter(name: str, *, delete_files: bool | None) -> Call[None]:
    """Repeated after it was carried out, it would fail with AdapterNotFound."""
    params = None if delete_files is None else {"delete_files": str(delete_files).lower()}
    return Call(Ask(method="DELETE", path=_adapter_path(name), params=params, repeat="unless_sent"), answers.nothing)


def get_adapter(name: str) -> Call[Adapter]:
    """``Client.get_adapter``."""
    return Call(Ask(method="GET", path=_adapter_path(name)), answers.adapter)


def adapters_page(after: str | None, options: ListOptions) -> Call[Page[Adapter]]:
    """A page of ``Client.list_adapters``, from the name after ``after`` on."""
    ask = Ask(method="GET", path="/v1/adapters", params=_after(after) | list_params(options))
    return Call(ask, answers.page_of(answers.adapter_object, "id"))


def models_page(after: str | None) -> Call[Page[Model]]:
    """A page of ``Client.models``, likewise."""
    ask = Ask(method="GET", path="/v1/models", params=_after(after))
    return Call(ask, answers.page_of(answers.model_object, "id"))


def health() -> Call[None]:
    """``Client.health``: asked once, and not for long."""
    ask = Ask(method="GET", path="/health", repeat="never", timeout=HEALTH_SECONDS)
    return Call(ask, answers.nothing)


def version() -> Call[str]:
    """``Client.version``."""
    return Call(Ask(method="GET", path="/version"), answers.version_text)


def _streamed(ask: Ask) -> Ask:
    return replace(ask, body={"stream_options": {"include_usage": True}, **(ask.body or {}), "stream": True})


def _after(after: str | None) -> dict[str, str | int]:
    return {"limit": PAGE_SIZE} if after is None else {"limit": PAGE_SIZE, "after": after}


def _adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"
