"""What every engine client has in common: the state that the engine reports, and the open requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from loraplex.server.engine_client import EngineState, StatsCallback
from loraplex.server.engine_requests import EngineRequests, Send
from loraplex.server.errors import LoraplexError, UnavailableError
from loraplex.server.messages import (
    AdapterInfo,
    AdapterRef,
    EngineInfo,
    EngineStats,
    Event,
    Generate,
    ListAdapters,
    LoadAdapter,
    StartFailed,
    StartProgress,
    TokenOutput,
    UnloadAdapter,
)
from loraplex.server.progress import Progress


class EngineSession:
    """The part of an ``EngineClient`` that does not depend on where the engine runs. Lives in one event loop.

    Args:
        send: passes a command to the engine; must not wait.
        progress: told of the weights read.
    """

    def __init__(self, send: Send, progress: Progress | None = None) -> None:
        self._requests = EngineRequests(send)
        self._progress = progress
        self._info: EngineInfo | None = None
        self._ready: asyncio.Future[None] | None = None
        self.stats = EngineStats()
        self.state: EngineState = "starting"
        self.on_stats: list[StatsCallback] = []

    @property
    def info(self) -> EngineInfo:
        """Of the engine that runs, or ran last. UnavailableError before the first is ready."""
        if self._info is None:
            raise UnavailableError("The engine has not started yet.")
        return self._info

    def _expect_ready(self) -> asyncio.Future[None]:
        """A future that ends with the start under way: its result, or the error that it failed with."""
        self._ready = asyncio.get_running_loop().create_future()
        return self._ready

    def _end_start(self, error: LoraplexError | None) -> None:
        if self._ready is None or self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    def _deliver(self, event: Event) -> None:
        match event:
            case EngineInfo():
                self._info = event
                self.state = "ready"
                self._end_start(None)
            case StartFailed(error=error):
                self._end_start(error.to_error())
            case StartProgress(done=done, total=total):
                if self._progress is not None:
                    self._progress(done, total)
            case EngineStats():
                self.stats = event
                for callback in self.on_stats:
                    callback(event)
            case _:
                self._requests.deliver(event)

    def generate(self, command: Generate) -> AsyncGenerator[TokenOutput, None]:
        """See ``EngineClient``."""
        return self._requests.generate(command)

    def abort_choice(self, request_id: str, index: int) -> None:
        """See ``EngineClient``."""
        self._requests.abort_choice(request_id, index)

    async def load_adapter(self, ref: AdapterRef) -> AdapterInfo:
        """Read and verify an adapter. LoraplexError where it cannot be served."""
        done = await self._requests.call(lambda call_id: LoadAdapter(call_id=call_id, adapter=ref))
        assert done.adapter is not None
        return done.adapter

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Forget a registration; its running requests finish."""
        await self._requests.call(lambda call_id: UnloadAdapter(call_id=call_id, adapter=ref))

    async def list_adapters(self) -> list[AdapterInfo]:
        """Every adapter that the engine has read."""
        done = await self._requests.call(lambda call_id: ListAdapters(call_id=call_id))
        return done.adapters or []
