"""Where the server is and how it is spoken to: the arguments of both clients, checked once."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2

from loraplex.clients.calls import Ask
from loraplex.clients.errors import ErrorDetails, InvalidConfiguration

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 600.0
CONNECT_SECONDS = 5.0
API_KEY_VARIABLE = "LORAPLEX_API_KEY"


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a server.

    Attributes:
        base_url: without a last slash.
        timeout: longest silence in seconds; None waits for ever.
    """

    base_url: str
    headers: dict[str, str]
    timeout: float | None
    max_retries: int

    @classmethod
    def checked(
        cls,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float | None,
        max_retries: int,
        headers: Mapping[str, str] | None = None,
    ) -> Connection:
        """From a client's arguments; InvalidConfiguration names the one that is wrong."""
        if timeout is not None and not timeout > 0:
            raise _invalid("timeout", f"timeout is {timeout}; accepted are seconds above 0, and None for no limit")
        if max_retries < 0:
            raise _invalid("max_retries", f"max_retries is {max_retries}; accepted is 0 and more")
        return cls(_checked_url(base_url), _own_headers(headers) | _headers(api_key), timeout, max_retries)

    @property
    def http_options(self) -> dict[str, Any]:
        """Arguments for both kinds of HTTP client. As many connections as there are requests at once."""
        options: dict[str, Any] = {
            "base_url": self.base_url,
            "headers": self.headers,
            "timeout": self._limits(self.timeout),
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=100),
        }
        if self.base_url.startswith("http://"):
            # Reading the system's certificates takes a tenth of a second; where none is checked, none is trusted.
            options["verify"] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return options

    def request_options(self, ask: Ask, opened: ExitStack) -> dict[str, Any]:
        """Arguments that make a request of what is asked. Files are read while it is sent, and closed with ``opened``.

        Raises:
            InvalidConfiguration: a file cannot be read.
        """
        options: dict[str, Any] = {"method": ask.method, "url": ask.path, "params": ask.params}
        if ask.body is not None:
            options["json"] = ask.body
        if ask.form is not None:
            options["data"] = ask.form
        if ask.files is not None:
            options["files"] = {name: (path.name, _open(path, opened)) for name, path in ask.files.items()}
        if ask.timeout is not None:
            options["timeout"] = self._limits(min(ask.timeout, self.timeout or ask.timeout))
        return options

    def _limits(self, seconds: float | None) -> httpx2.Timeout:
        connect = CONNECT_SECONDS if seconds is None else min(CONNECT_SECONDS, seconds)
        return httpx2.Timeout(seconds, connect=connect)


def _open(path: Path, opened: ExitStack) -> IO[bytes]:
    try:
        return opened.enter_context(path.open("rb"))
    except OSError as error:
        raise _invalid("path", f"{path} cannot be read: {error.strerror}; accepted is a file") from error


def _checked_url(base_url: str) -> str:
    accepted = f"accepted is http://HOST:PORT or https://HOST:PORT, such as {DEFAULT_URL}"
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise _invalid("base_url", f"base_url {base_url!r} is no URL: {error}; {accepted}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise _invalid("base_url", f"base_url {base_url!r} is not the URL of a server; {accepted}")
    # OpenAI's clients are given the URL with /v1, so people paste it like that.
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _headers(api_key: str | None) -> dict[str, str]:
    key = (os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not key.isascii() or not key.isprintable():
        raise _invalid("api_key", "api_key holds characters that a header cannot carry; accepted is printable ASCII")
    return {"authorization": f"Bearer {key}"} if key else {}


def _own_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    for name, value in (headers or {}).items():
        if not (name.isascii() and name.isprintable() and value.isascii() and value.isprintable()):
            raise _invalid("headers", f"header {name!r} cannot be sent; accepted is printable ASCII")
    return {name.lower(): value for name, value in (headers or {}).items()}


def _invalid(param: str, message: str) -> InvalidConfiguration:
    return InvalidConfiguration(ErrorDetails(message, param=param, sent=False))
