"""The commands of ``loraplex adapters`` that speak to a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from loraplex.clients.adapter_options import ListOptions
from loraplex.clients.client import Client
from loraplex.clients.connection import DEFAULT_URL
from loraplex.clients.types import Adapter
from loraplex.server.cli_options import ApiKey, Url
from loraplex.server.cli_report import client_errors_reported, print_line, table_console

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Replace = Annotated[bool, typer.Option("--replace", help="Also if the name is taken.")]
Pin = Annotated[bool, typer.Option("--pin", help="Keep it in the pool.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag to find it by; repeatable.")]
State = Literal["registered", "loading", "ready", "failed"]
Tier = Literal["disk", "host", "pool"]


def list_adapters(
    prefix: Annotated[str | None, typer.Option("--prefix", help="Only names that begin with this.")] = None,
    state: Annotated[State | None, typer.Option("--state", help="Only adapters in this state.")] = None,
    tier: Annotated[Tier | None, typer.Option("--tier", help="Only adapters that are there now.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only adapters of this kind, of those once read.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Only adapters with this tag.")] = None,
    pinned: Annotated[bool | None, typer.Option("--pinned/--not-pinned", help="Only pinned ones, or the rest.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Not more than so many.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the adapters of a running server."""
    options: ListOptions = {
        "prefix": prefix,
        "state": state,
        "tier": tier,
        "kind": kind,
        "tag": tag,
        "pinned": pinned,
    }
    with _server(url, api_key) as client:
        found = client.list_adapters(**options)
        adapters = [adapter for _, adapter in zip(range(limit), found)] if limit else list(found)
    if as_json:
        typer.echo(json.dumps([dict(adapter.raw) for adapter in adapters], indent=2))
    else:
        _print_table(adapters)


def show_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Tell all that a running server knows of an adapter."""
    with _server(url, api_key) as client:
        adapter = client.get_adapter(name)
    if as_json:
        typer.echo(json.dumps(dict(adapter.raw), indent=2))
    else:
        _print_facts(adapter.raw)


def load_adapter(
    name: Name,
    path: Annotated[str, typer.Argument(help="Its folder, as the server sees it, or a source that it allows.")],
    replace: Replace = False,
    pin: Pin = False,
    tags: Tags = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load an adapter into a running server, or load it anew.

    A PATH that exists on this machine is sent as an absolute path.
    """
    with _server(url, api_key) as client:
        seen = _as_server_sees_it(path)
        adapter = client.load_adapter(name, seen, replace=replace, pinned=pin or None, tags=tags or None)
    _report("loaded", adapter)


def upload_adapter(
    name: Name,
    path: Annotated[Path, typer.Argument(help="Its folder on this machine, or an archive of it: .tar, .tar.gz, .zip.")],
    replace: Replace = False,
    pin: Pin = False,
    tags: Tags = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Send an adapter from this machine to a running server, which keeps it."""
    with _server(url, api_key) as client:
        adapter = client.upload_adapter(name, path, replace=replace, pinned=pin or None, tags=tags or None)
    _report("uploaded", adapter)


def unload_adapter(
    name: Name,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Leave the files of an upload.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Take an adapter from a running server; requests that use it finish."""
    with _server(url, api_key) as client:
        client.unload_adapter(name, delete_files=False if keep_files else None)
    _print_done("unloaded", name)


def pin_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Bring an adapter into the pool and keep it there."""
    with _server(url, api_key) as client:
        adapter = client.pin_adapter(name)
    _print_done("pinned", f"{adapter.name}: {_shown(adapter.pages)} pages")


def unpin_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Keep an adapter in the pool no longer than is of use."""
    with _server(url, api_key) as client:
        client.unpin_adapter(name)
    _print_done("unpinned", name)


def prefetch_adapter(
    name: Name,
    tier: Annotated[
        Literal["host", "pool"], typer.Option("--tier", help="How far: to the server's memory, or to the pool.")
    ] = "pool",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Bring an adapter up before anybody asks for it."""
    with _server(url, api_key) as client:
        adapter = client.prefetch_adapter(name, tier)
    _print_done("prefetched", f"{adapter.name}: {_shown(adapter.tier)}")


def tag_adapter(
    name: Name,
    tags: Annotated[list[str] | None, typer.Argument(help="All that it is to have; none takes them away.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Give an adapter other tags."""
    with _server(url, api_key) as client:
        adapter = client.change_adapter(name, tags=tags or [])
    _print_done("tagged", f"{adapter.name}: {' '.join(adapter.tags) or 'no tags'}")


SERVER_COMMANDS: Mapping[str, Callable[..., None]] = {
    "list": list_adapters,
    "show": show_adapter,
    "load": load_adapter,
    "upload": upload_adapter,
    "unload": unload_adapter,
    "pin": pin_adapter,
    "unpin": unpin_adapter,
    "prefetch": prefetch_adapter,
    "tag": tag_adapter,
}


@contextmanager
def _server(url: str, api_key: str | None) -> Iterator[Client]:
    """A client of a server, whose errors end the command in one line."""
    with client_errors_reported(), Client(url, api_key=api_key) as client:
        yield client


def _as_server_sees_it(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _report(label: str, adapter: Adapter) -> None:
    _print_done(label, f"{adapter.name}: rank {_shown(adapter.rank)}, {_shown(adapter.pages)} pages, {adapter.path}")
    for warning in adapter.warnings:
        print_line(Console(stderr=True), "warning:", "yellow", warning)


def _print_done(label: str, message: str) -> None:
    print_line(Console(), label, "green", message)


def _print_table(adapters: Sequence[Adapter]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("kind")
    table.add_column("rank", justify="right")
    table.add_column("state")
    table.add_column("tier")
    table.add_column("pages", justify="right")
    table.add_column("path", overflow="fold")
    for one in adapters:
        tier = f"{one.tier} (pinned)" if one.pinned else one.tier
        cells = (one.name, one.kind, one.rank, one.state, tier, one.pages, one.path)
        table.add_row(*(Text(_shown(cell)) for cell in cells))
    table_console().print(table)


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in {"object", "name"}:
            table.add_row(name.replace("_", " ").removeprefix("num "), Text(_fact(name, value)))
    table_console().print(table)


def _fact(name: str, value: object) -> str:
    if name == "bytes" and isinstance(value, int):
        return f"{value} ({decimal(value)})"
    if isinstance(value, Mapping):
        return str(value.get("message"))
    return (" ".join(map(str, value)) or "-") if isinstance(value, list) else _shown(value)


def _shown(value: object) -> str:
    """A cell; what the server does not know before the adapter's first use is a dash."""
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
