"""The asynchronous client. ``client.py`` is its twin."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import httpx2

from loraplex.clients import calls
from loraplex.clients.adapter_options import ChangeOptions, ListOptions, LoadOptions
from loraplex.clients.calls import Ask, Call, StreamCall
from loraplex.clients.connection import DEFAULT_TIMEOUT, DEFAULT_URL, Connection
from loraplex.clients.errors import NOT_HEALTHY, LoraplexClientError
from loraplex.clients.failures import connection_errors, failed_answer, read_answer
from loraplex.clients.options import AdapterId, CompletionOptions, GenerationOptions
from loraplex.clients.retries import pause_before_retry
from loraplex.clients.sse import EventReader
from loraplex.clients.streams import AsyncStream
from loraplex.clients.types import Adapter, Completion, Model, Page, StreamEvent

T = TypeVar("T")


class AsyncClient:
    """Speaks to a Loraplex server. Tasks of one event loop may share one; it keeps connections open until it is closed.

    Every call raises a ``LoraplexClientError`` if it fails. Where the server could not be reached, was overloaded or
    not ready (429, 503), it is made again up to ``max_retries`` times, after the time that the server asks for.

    Args:
        base_url: of the server; a last ``/v1`` is ignored.
        api_key: where the server wants one; by default the environment variable ``LORAPLEX_API_KEY``.
        timeout: longest silence of the server, in seconds; None waits for ever.
        max_retries: how often a call is made again.
        headers: sent with every call, such as ``traceparent``.
        transport: in place of the network; an ASGI app in tests, or a transport with a proxy or certificates.

    Raises:
        InvalidConfiguration: an argument is not acceptable.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = Connection.checked(
            base_url, api_key=api_key, timeout=timeout, max_retries=max_retries, headers=headers
        )
        self._http = httpx2.AsyncClient(transport=transport, **self._connection.http_options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; the client is of no use afterwards."""
        await self._http.aclose()

    async def generate(
        self, prompt: str | Sequence[int], *, adapter_id: AdapterId | None = None, **options: Unpack[CompletionOptions]
    ) -> Completion:
        """Continue a text, or a list of token ids, with an adapter, or with the base model where none is named.

        ``adapter_id`` may be a mix, too: ``{"formal": 0.7, "short": 0.3}``.
        """
        return await self._send(calls.complete(prompt, adapter_id, options))

    def stream(
        self, prompt: str | Sequence[int], *, adapter_id: AdapterId | None = None, **options: Unpack[CompletionOptions]
    ) -> AsyncStream:
        """``generate``, piece by piece as it comes."""
        return AsyncStream(self._events(calls.stream_completion(prompt, adapter_id, options)))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter_id: AdapterId | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Answer a conversation: ``[{"role": "user", "content": "..."}]``."""
        return await self._send(calls.chat(messages, adapter_id, options))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter_id: AdapterId | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream:
        """``chat``, piece by piece as it comes."""
        return AsyncStream(self._events(calls.stream_chat(messages, adapter_id, options)))

    async def load_adapter(self, name: str, path: str | PathLike[str], **options: Unpack[LoadOptions]) -> Adapter:
        """Verify and register an adapter from a folder on the server, or from a remote source that it allows."""
        return await self._send(calls.load_adapter(name, fspath(path), options))

    async def upload_adapter(self, name: str, path: str | PathLike[str], **options: Unpack[LoadOptions]) -> Adapter:
        """Send an adapter from this machine, a folder or an archive of one, and register it once it was verified."""
        return await self._send(calls.upload_adapter(name, path, options))

    async def change_adapter(self, name: str, **options: Unpack[ChangeOptions]) -> Adapter:
        """Give an adapter other tags, pin it or not, or move its name to another content in place."""
        return await self._send(calls.change_adapter(name, options))

    async def pin_adapter(self, name: str) -> Adapter:
        """Bring an adapter into the pool and keep it there."""
        return await self._send(calls.pin_adapter(name, pinned=True))

    async def unpin_adapter(self, name: str) -> Adapter:
        """Keep an adapter in the pool no longer than is of use."""
        return await self._send(calls.pin_adapter(name, pinned=False))

    async def prefetch_adapter(self, name: str, tier: Literal["host", "pool"] = "pool") -> Adapter:
        """Bring an adapter up to the pool, or only to the server's memory, before anybody asks for it."""
        return await self._send(calls.prefetch_adapter(name, tier))

    async def unload_adapter(self, name: str, *, delete_files: bool | None = None) -> None:
        """Forget an adapter; requests that use it finish.

        Args:
            delete_files: by default those of an upload are deleted; others never are.
        """
        await self._send(calls.unload_adapter(name, delete_files=delete_files))

    def list_adapters(self, **options: Unpack[ListOptions]) -> AsyncIterator[Adapter]:
        """All adapters, or those that the options tell of, in order of their names, fetched page by page."""
        return self._pages(lambda after: calls.adapters_page(after, options))

    async def get_adapter(self, name: str) -> Adapter:
        """One adapter; AdapterNotFound if there is none of that name."""
        return await self._send(calls.get_adapter(name))

    async def models(self) -> list[Model]:
        """The base model, then the adapters as models."""
        return [model async for model in self._pages(calls.models_page)]

    async def health(self) -> bool:
        """Whether the server can be reached and is ready."""
        try:
            await self._send(calls.health())
        except NOT_HEALTHY:
            return False
        return True

    async def version(self) -> str:
        """The server's version."""
        return await self._send(calls.version())

    async def _send(self, call: Call[T]) -> T:
        return read_answer(call, await self._exchange(call.ask, stream=False))

    async def _pages(self, page_after: Callable[[str | None], Call[Page[T]]]) -> AsyncIterator[T]:
        page = await self._send(page_after(None))
        for item in page.items:
            yield item
        while page.next_after is not None:
            page = await self._send(page_after(page.next_after))
            for item in page.items:
                yield item

    async def _events(self, call: StreamCall) -> AsyncGenerator[StreamEvent, None]:
        response = await self._exchange(call.ask, stream=True)
        try:
            reader = EventReader(response, call.read)
            with reader.interruptions():
                async for event in reader.source:
                    told = reader.read(event)
                    if told is not None:
                        yield told
            reader.end()
        finally:
            await response.aclose()

    async def _exchange(self, ask: Ask, *, stream: bool) -> httpx2.Response:
        attempt = 0
        while True:
            try:
                return await self._attempt(ask, stream=stream)
            except LoraplexClientError as error:
                retries = self._connection.max_retries
                pause = pause_before_retry(error, attempt=attempt, max_retries=retries, repeat=ask.repeat)
                if pause is None:
                    raise
            await sleep(pause)
            attempt += 1

    async def _attempt(self, ask: Ask, *, stream: bool) -> httpx2.Response:
        with ExitStack() as opened, connection_errors():
            options = self._connection.request_options(ask, opened)
            response = await self._http.send(self._http.build_request(**options), stream=stream)
            if response.is_success:
                return response
            try:
                await response.aread()
            finally:
                await response.aclose()
        raise failed_answer(response)
