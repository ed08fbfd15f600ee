"""How commands print: tables, labelled lines, and what went wrong in one line on the standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from loraplex.clients.errors import AuthenticationFailed, ConnectionFailed, LoraplexClientError
from loraplex.server.errors import LoraplexError

_UNBOUNDED = 10_000


def table_console() -> Console:
    """The standard output for tables; where it is no terminal, nothing is cut or folded to fit."""
    console = Console()
    return console if console.is_terminal else Console(width=_UNBOUNDED)


def fail(message: str) -> NoReturn:
    """Report an error and end the command."""
    print_error(message)
    raise typer.Exit(1)


def print_error(message: str) -> None:
    """Report an error in one line."""
    print_line(Console(stderr=True), "error:", "red", message)


def print_line(console: Console, label: str, style: str, message: str) -> None:
    """One line that begins with a coloured label, whatever the message holds."""
    line = " ".join(message.split())
    console.print(Text.assemble((label, style), " ", line), soft_wrap=True)


@contextmanager
def client_errors_reported() -> Iterator[None]:
    """Report an error of the client and end the command."""
    try:
        yield
    except LoraplexClientError as error:
        fail(describe(error))


@contextmanager
def server_errors_reported() -> Iterator[None]:
    """Report an error that is raised in this process and end the command."""
    try:
        yield
    except LoraplexError as error:
        fail(error.message)


def describe(error: LoraplexClientError) -> str:
    """An error of the client in a line, with what to do about it where the command line has a flag for it."""
    if isinstance(error, ConnectionFailed) and not error.details.sent:
        return f"{error.message}; start a server with 'loraplex serve', or name another with --url"
    if isinstance(error, AuthenticationFailed):
        return f"{error.message}; give a key with --api-key or LORAPLEX_API_KEY"
    return error.message
