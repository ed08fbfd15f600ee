"""``loraplex adapters``: the adapters of a running server, and adapter folders on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraplex.server.cli_served_adapters import SERVER_COMMANDS, Json
from loraplex.server.engine_config import DtypeName
from loraplex.server.lazy import run_lazily

_FILES = "loraplex.server.cli_adapter_files"
_CONVERT = "loraplex.server.cli_convert:convert"

PageTokens = Annotated[int, typer.Option("--page-tokens", min=1, help="Tokens of a page of the server's pool.")]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="That the base is served in; auto as the server decides.")]

AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read pickled weights, too.")]

adapters_app = typer.Typer(help="List, load, upload, pin, check and convert adapters.", no_args_is_help=True)
for _name, _command in SERVER_COMMANDS.items():
    adapters_app.command(_name)(_command)


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
