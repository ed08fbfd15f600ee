"""Flags that every command which speaks to a server has."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex.clients.connection import API_KEY_VARIABLE

URL_VARIABLE = "LORAPLEX_URL"

Url = Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="URL of the server.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar=API_KEY_VARIABLE, help="Key, where the server wants one.")
]
