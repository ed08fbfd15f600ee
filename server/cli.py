"""The command ``loraplex``."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version as version_of
from types import FrameType
from typing import Annotated

import typer

from loraplex.server.cli_adapters import adapters_app
from loraplex.server.cli_chat import chat
from loraplex.server.cli_serve import demo, serve

app = typer.Typer(
    name="loraplex",
    help="One frozen base model and thousands of adapters, served together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(demo)
app.command()(chat)
app.add_typer(adapters_app, name="adapters")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"loraplex {version_of('loraplex')}")


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def _root(_version: Version = False) -> None:
    pass


def main() -> None:
    """Entry point of the console command."""
    if os.getpid() == 1:
        # A container's first process has no default actions: until the server listens, it would be deaf.
        signal.signal(signal.SIGTERM, _stop)
    sys.exit(app())


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """As a signal ends a process that does not handle it."""
    sys.exit(128 + number)
