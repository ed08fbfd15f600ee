"""Options of the calls about adapters, and what of a request they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict

from loraplex.clients.errors import ErrorDetails, InvalidConfiguration

UPLOADED_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""What of a folder is sent; the last one only where there is nothing better."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class LoadOptions(TypedDict, total=False):
    """What ``load_adapter`` and ``upload_adapter`` take by name.

    Attributes:
        replace: also if the name stands for another content; else that is a Conflict.
        pinned: keep it in the pool.
        tags: to find it by.
    """

    replace: bool
    pinned: bool | None
    tags: Sequence[str] | None


class ChangeOptions(TypedDict, total=False):
    """What ``change_adapter`` takes by name; what is absent stays.

    Attributes:
        path: another place on the server, that the name is moved to once the adapter there was verified.
        pinned: whether it is kept in the pool.
        tags: all that it has from now on.
    """

    path: str | PathLike[str] | None
    pinned: bool | None
    tags: Sequence[str] | None


class ListOptions(TypedDict, total=False):
    """What ``list_adapters`` takes by name: only adapters that all of it is true of are listed.

    Attributes:
        prefix: what their names begin with.
        kind: as of adapters that the server has read at some time.
    """

    prefix: str | None
    state: Literal["registered", "loading", "ready", "failed"] | None
    tier: Literal["disk", "host", "pool"] | None
    kind: str | None
    tag: str | None
    pinned: bool | None


def load_fields(options: LoadOptions) -> dict[str, Any]:
    """Fields of a body; TypeError for an option that there is not."""
    return _given(options, LoadOptions)


def change_fields(options: ChangeOptions) -> dict[str, Any]:
    """Likewise."""
    return _given(options, ChangeOptions)


def upload_form(options: LoadOptions) -> dict[str, str]:
    """Fields of a form; TypeError likewise."""
    return {name: _as_text(value) for name, value in _given(options, LoadOptions).items()}


def list_params(options: ListOptions) -> dict[str, str | int]:
    """Parameters of a URL; TypeError likewise."""
    return {name: _as_text(value) for name, value in _given(options, ListOptions).items()}


def upload_files(path: str | PathLike[str]) -> dict[str, Path]:
    """The files to send of an adapter's folder, or an archive of one; InvalidConfiguration if it is neither."""
    found = Path(path)
    if found.is_file() and found.name.lower().endswith(ARCHIVES):
        return {"file": found}
    config, *weights = (found / name for name in UPLOADED_FILES)
    chosen = next((file for file in weights if file.is_file()), None)
    if chosen is None or not config.is_file():
        accepted = (
            f"accepted is a folder with {UPLOADED_FILES[0]} and {UPLOADED_FILES[1]}, or its {', '.join(ARCHIVES)}"
        )
        raise InvalidConfiguration(
            ErrorDetails(f"path {str(found)!r} is no adapter; {accepted}", param="path", sent=False)
        )
    return {config.name: config, chosen.name: chosen}


def _given(options: Mapping[str, Any], accepted: type[Any]) -> dict[str, Any]:
    known = accepted.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; accepted are {', '.join(sorted(known))}")
    return {name: _plain(value) for name, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    return str(value) if isinstance(value, PathLike) else list(value)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else ",".join(value)
