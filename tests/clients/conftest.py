"""A server that says what it is told to, on loopback, and both clients behind one blocking face."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from loraplex.clients import async_client, client
from loraplex.clients.async_client import AsyncClient
from loraplex.clients.client import Client

EVENT_STREAM = {"content-type": "text/event-stream"}


@dataclass
class Reply:
    """What the server answers.

    Args:
        body: sent as JSON, or as it is where it is text.
        events: pieces of a stream, in place of a body.
        then: what happens after the events: the stream "ends", the connection is "cut", or the server "hangs" until
            the client is gone.
    """

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    events: list[bytes] | None = None
    then: str = "ends"


@dataclass
class Received:
    """What the server heard."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


class FakeServer:
    """Gives one reply after another, the last one over and over."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.received: list[Received] = []
        self.client_gone = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self._app, log_level="critical", lifespan="off", ws="none", interface="asgi3")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def reset(self) -> None:
        self.replies.clear()
        self.received.clear()
        self.client_gone.clear()

    def say(self, *replies: Reply) -> None:
        """What to answer from now on."""
        self.replies = deque(replies)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        content = b""
        more = True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        self.received.append(
            Received(
                method=scope["method"],
                path=scope["raw_path"].decode(),
                query=scope["query_string"].decode(),
                headers={name.decode(): value.decode() for name, value in scope["headers"]},
                body=_content(content),
            )
        )
        reply = self.replies.popleft() if len(self.replies) > 1 else self.replies[0]
        await (self._stream if reply.events is not None else self._answer)(reply, receive, send)

    async def _answer(self, reply: Reply, receive: Any, send: Any) -> None:
        body = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
        if reply.then == "hangs":
            await self._hang(receive)
        announced = len(body) + 10 if reply.then == "cut" else len(body)
        headers = {"content-length": str(announced), **reply.headers}
        await send({"type": "http.response.start", "status": reply.status, "headers": _raw(headers)})
        await send({"type": "http.response.body", "body": body})
        if reply.then == "cut":
            raise ConnectionResetError

    async def _stream(self, reply: Reply, receive: Any, send: Any) -> None:
        headers = EVENT_STREAM | dict(reply.headers)
        await send({"type": "http.response.start", "status": reply.status, "headers": _raw(headers)})
        for event in reply.events or []:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(0.001)
        if reply.then == "cut":
            raise ConnectionResetError
        if reply.then == "hangs":
            await self._hang(receive)
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _hang(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_gone.set()


def _content(body: bytes) -> Any:
    """JSON, or the bytes of a form."""
    return None if not body else body if body.startswith(b"--") else json.loads(body)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


class Blocking:
    """An ``AsyncClient`` with the face of a ``Client``: what it awaits is waited for."""

    def __init__(self, runner: asyncio.Runner, target: Any) -> None:
        self._runner = runner
        self._target = target

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*args, **kwargs)
            if inspect.isawaitable(result):
                return self._wait(result)
            return Blocking(self._runner, result) if isinstance(result, AsyncIterator) else result

        return call

    def close(self) -> None:
        self._wait(self._target.aclose())

    def __iter__(self) -> Blocking:
        return self

    def __next__(self) -> Any:
        try:
            return self._wait(anext(self._target))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Blocking:
        self._wait(self._target.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait(self._target.__aexit__(*error))

    def _wait(self, awaitable: Any) -> Any:
        async def waiting() -> Any:
            return await awaitable

        return self._runner.run(waiting())


@pytest.fixture(scope="session")
def running_server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running_server: FakeServer) -> FakeServer:
    running_server.reset()
    return running_server


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the clients would have slept between attempts."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(client, "sleep", slept.append)
    monkeypatch.setattr(async_client, "sleep", sleep)
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    return slept


@pytest.fixture(params=["sync", "async"])
def make_client(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Callable[..., Any]]:
    """Makes clients of both kinds, with their arguments as arguments."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if request.param == "async" else None

        def make(base_url: str | None = None, **options: Any) -> Any:
            url = base_url or server.url
            made = Client(url, **options) if runner is None else Blocking(runner, AsyncClient(url, **options))
            return stack.enter_context(made)

        yield make


@pytest.fixture
def lora(make_client: Callable[..., Any]) -> Any:
    """A client of the fake server."""
    return make_client(timeout=5.0)


@pytest.fixture
def reply() -> type[Reply]:
    return Reply
