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
from loraplex.server.engine_config import DtypeName
from loraplex.server.lazy import run_lazily

_FILES = "loraplex.server.cli_adapter_files"
_CONVERT = "loraplex.server.cli_convert:convert"

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
PageTokens = Annotated[int, typer.Option("--page-tokens", min=1, help="Tokens of a page of the server's pool.")]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="That the base is served in; auto as the server decides.")]

AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read pickled weights, too.")]

adapters_app = typer.Typer(help="List, check, convert, load and unload adapters.", no_args_is_help=True)


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
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Tell what an adapter folder holds. Needs no server."""
    run_lazily(
        f"{_FILES}:inspect", path, base, allow_bin=allow_bin, page_tokens=page_tokens, dtype=dtype, as_json=as_json
    )


@adapters_app.command("verify")
def verify_adapters(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders of adapters, or folders of those.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of the base model; DoRA and token-wise routing need it.")
    ] = None,
    allow_bin: AllowBin = False,
    page_tokens: PageTokens = 16,
    dtype: Dtype = "auto",
) -> None:
    """Make every check that a server makes before it serves an adapter. Needs no server.

    Without a base model, everything but whether it fits one. Exits with 1 if any adapter cannot be served.
    """
    run_lazily(f"{_FILES}:verify", paths, base, allow_bin=allow_bin, page_tokens=page_tokens, dtype=dtype)


@adapters_app.command("convert")
def convert_adapter(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders of adapters.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of the base model. Only renaming does without it.")
    ] = None,
    gates: Annotated[
        list[Path] | None,
        typer.Option("--gates", help="Checkpoint with the gates of a MeteoRA whose LoRAs are the PATHs; repeatable."),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option("--router", help="Safetensors file with the [PATHs, hidden] router of a token-wise mixture."),
    ] = None,
    initial: Annotated[
        Path | None, typer.Option("--initial", help="Folder of a PiSSA, OLoRA or the like as it was before training.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts of a token, with --gates or --router.")] = 2,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the gates, with --gates.")] = 1.0,
    allow_bin: AllowBin = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an adapter.")] = False,
) -> None:
    """Write adapters in a form that can be served. Needs no server.

    One PATH: safetensors, MixLoRA in today's naming, PiSSA and OLoRA as plain LoRA. Several PATHs: one mixture of them,
    with --gates or --router. The result is read back with every check before it appears.
    """
    run_lazily(
        _CONVERT,
        paths,
        out,
        base,
        gates=gates or [],
        router=router,
        initial=initial,
        top_k=top_k,
        temperature=temperature,
        allow_bin=allow_bin,
        force=force,
    )


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
