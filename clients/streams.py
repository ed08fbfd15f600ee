"""Streams of events that can be closed early."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Self

from loraplex.clients.types import StreamEvent


class Stream(Iterator[StreamEvent]):
    """A streamed answer. The request is sent when the first event is asked for.

    Closing it, by ``close`` or by leaving its ``with`` block, disconnects, and the server stops to generate.
    """

    def __init__(self, events: Generator[StreamEvent, None, None]) -> None:
        self._events = events

    def __next__(self) -> StreamEvent:
        return next(self._events)

    def close(self) -> None:
        """End it; does nothing if it is over."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[StreamEvent]):
    """A streamed answer. The request is sent when the first event is asked for.

    Closing it, by ``aclose`` or by leaving its ``async with`` block, disconnects, and the server stops to generate.
    """

    def __init__(self, events: AsyncGenerator[StreamEvent, None]) -> None:
        self._events = events

    async def __anext__(self) -> StreamEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        """End it; does nothing if it is over."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
