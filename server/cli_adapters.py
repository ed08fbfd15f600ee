"""``loraplex adapters``: the adapters of a running server, and adapter folders on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.clients.client import Client
from loraplex.clients.connection import DEFAULT_URL
from loraplex.clients.types import Adapter
from loraplex.server.cli_options import ApiKey, Url
from loraplex.server.cli_report import client_errors_reported, print_line, table_console
from loraplex.server.lazy import run_lazily

_FILES = "loraplex.server.cli_adapter_files"

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
PageTokens = Annotated[int, typer.Option("--page-tokens", min=1, help="Tokens of a page of the server's pool.")]

adapters_app = typer.Typer(help="List, check, load and unload adapters.", no_args_is_help=True)


@adapters_app.command("list")
def list_adapters(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """List the adapters of a running server."""
    with client_errors_reported(), Client(url, api_key=api_key) as client:
        adapters = list(client.list_adapters())
    if as_json:
        typer.echo(json.dumps([dict(adapter.raw) for adapter in adapters], indent=2))
    else:
        _print_table(adapters)


@adapters_app.command("load")
def load_adapter(
    name: Name,
    path: Annotated[str, typer.Argument(help="Its folder, as the server sees it.")],
    replace: Annotated[bool, typer.Option("--replace", help="Also if the name is taken.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load an adapter into a running server, or load it anew.

    A PATH that exists on this machine is sent as an absolute path.
    """
    with client_errors_reported(), Client(url, api_key=api_key) as client:
        adapter = client.load_adapter(name, _as_server_sees_it(path), replace=replace)
    _print_done("loaded", f"{adapter.name}: rank {_shown(adapter.rank)}, {_shown(adapter.pages)} pages, {adapter.path}")
    for warning in adapter.warnings:
        print_line(Console(stderr=True), "warning:", "yellow", warning)


@adapters_app.command("unload")
def unload_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Take an adapter from a running server; requests that use it finish."""
    with client_errors_reported(), Client(url, api_key=api_key) as client:
        client.unload_adapter(name)
    _print_done("unloaded", name)


@adapters_app.command("inspect")
def inspect_adapter(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of a base model: tell what it takes there, too.")
    ] = None,
    allow_bin: Annotated[bool, typer.Option("--allow-bin", help="Read pickled weights, with --base.")] = False,
    page_tokens: PageTokens = 16,
    as_json: Json = False,
) -> None:
    """Tell what an adapter folder holds. Needs no server."""
    run_lazily(f"{_FILES}:inspect", path, base, allow_bin=allow_bin, page_tokens=page_tokens, as_json=as_json)


@adapters_app.command("verify")
def verify_adapters(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders of adapters, or folders of those.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    allow_bin: Annotated[bool, typer.Option("--allow-bin", help="Read pickled weights, too.")] = False,
    page_tokens: PageTokens = 16,
) -> None:
    """Make every check that a server makes before it serves an adapter. Needs no server.

    Exits with 1 if any adapter cannot be served.
    """
    run_lazily(f"{_FILES}:verify", paths, base, allow_bin=allow_bin, page_tokens=page_tokens)


def _as_server_sees_it(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _print_done(label: str, message: str) -> None:
    print_line(Console(), label, "green", message)


def _print_table(adapters: list[Adapter]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("kind")
    table.add_column("rank", justify="right")
    table.add_column("tier")
    table.add_column("pages", justify="right")
    table.add_column("path", overflow="fold")
    for one in adapters:
        cells = (one.name, one.kind, one.rank, one.tier, one.pages, one.path)
        table.add_row(*(Text(_shown(cell)) for cell in cells))
    table_console().print(table)


def _shown(value: object) -> str:
    """A cell; what the server does not know before the adapter's first use is a dash."""
    return "-" if value is None else str(value)
