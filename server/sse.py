"""Server-sent events: ``data: <one line of JSON>`` and an empty line, LF only; comments keep idle streams open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

T = TypeVar("T")


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancelled(task, watcher)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come, then ``[DONE]``, and closes.

    The status waits for the first event, for ``ping_seconds`` at most: until then a failure is raised, so that it gets
    a status and a body of its own. After that the headers go out, comments fill every silence of ``ping_seconds``, and
    a failure is one last event, without ``[DONE]``. When the client goes away, ``events`` is closed.

    Args:
        events: encoded events.
        describe_error: the last event's data, for a failure in mid-stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        describe_error: Callable[[BaseException], dict[str, Any]],
        ping_seconds: float,
        headers: dict[str, str],
    ) -> None:
        self._events = events
        self._describe_error = describe_error
        self._ping_seconds = ping_seconds
        self._started = False
        self._last_sent = time.monotonic()
        self._writing = asyncio.Lock()
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        sender = asyncio.create_task(self._send_events(send))
        watcher = asyncio.create_task(self._watch(receive, send))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                raise ClientDisconnect
            sender.result()
        except asyncio.CancelledError as error:
            await _cancelled(sender, watcher)
            if self._started:
                await self._write(send, event(self._describe_error(error)), more=False)
            raise
        finally:
            await _cancelled(sender, watcher)

    async def _send_events(self, send: Send) -> None:
        last = DONE
        try:
            async with aclosing(self._events) as events:
                async for encoded in events:
                    await self._write(send, encoded)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not self._started:
                raise
            last = event(self._describe_error(error))
        await self._write(send, last, more=False)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client is gone; until then it fills the silence."""
        while True:
            silence = time.monotonic() - self._last_sent
            try:
                async with asyncio.timeout(max(self._ping_seconds - silence, 0)):
                    await _disconnected(receive)
                return
            except TimeoutError:
                if time.monotonic() - self._last_sent >= self._ping_seconds:
                    await self._write(send, PING)

    async def _write(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        async with self._writing:
            try:
                if not self._started:
                    self._started = True
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await send(start)
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
            except OSError as error:
                raise ClientDisconnect from error
            self._last_sent = time.monotonic()
