"""What every engine client has in common: the state that the engine reports, and the open requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from loraplex.server.adapter_view import AdapterView
from loraplex.server.engine_client import EngineState, Restore, StatsCallback, TargetTier
from loraplex.server.engine_requests import EngineRequests, Send
from loraplex.server.errors import LoraplexError, UnavailableError
from loraplex.server.messages import (
    AdapterInfo,
    AdapterRef,
    AdapterStates,
    EngineInfo,
    EngineStats,
    Event,
    Generate,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
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
        self._send_command = send
        self._requests = EngineRequests(send)
        self._progress = progress
        self._info: EngineInfo | None = None
        self._ready: asyncio.Future[None] | None = None
        self._restore: Restore | None = None
        self.adapters = AdapterView()
        self.stats = EngineStats()
        self.state: EngineState = "starting"
        self.restarts = 0
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
                self.adapters.clear()
                self._send_restored()
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
            case AdapterStates(states=states):
                self.adapters.update(states)
            case _:
                self._requests.deliver(event)

    def restore_from(self, restore: Restore) -> None:
        """See ``EngineClient``."""
        self._restore = restore
        if self.state == "ready":
            self._send_restored()

    def _send_restored(self) -> None:
        if self._restore is not None and (known := self._restore()):
            self._send_command(RestoreAdapters(adapters=known))

    def generate(self, command: Generate) -> AsyncGenerator[TokenOutput, None]:
        """See ``EngineClient``."""
        return self._requests.generate(command)

    def abort_choice(self, request_id: str, index: int) -> None:
        """See ``EngineClient``."""
        self._requests.abort_choice(request_id, index)

    def running(self, ref: AdapterRef) -> int:
        """See ``EngineClient``."""
        return self._requests.running[ref.path, ref.revision]

    @property
    def wanted(self) -> Collection[tuple[str, int]]:
        """See ``EngineClient``."""
        return self._requests.running.keys()

    async def load_adapter(self, ref: AdapterRef) -> AdapterInfo:
        """See ``EngineClient``."""
        done = await self._requests.call(lambda call_id: LoadAdapter(call_id=call_id, adapter=ref))
        assert done.adapter is not None
        return done.adapter

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """See ``EngineClient``."""
        try:
            await self._requests.call(lambda call_id: UnloadAdapter(call_id=call_id, adapter=ref))
        finally:
            self.adapters.forget(ref)

    async def pin_adapter(self, ref: AdapterRef, pinned: bool) -> AdapterInfo | None:
        """See ``EngineClient``."""
        done = await self._requests.call(lambda call_id: PinAdapter(call_id=call_id, adapter=ref, pinned=pinned))
        return done.adapter

    async def prefetch_adapter(self, ref: AdapterRef, tier: TargetTier) -> AdapterInfo:
        """See ``EngineClient``."""
        done = await self._requests.call(lambda call_id: PrefetchAdapter(call_id=call_id, adapter=ref, tier=tier))
        assert done.adapter is not None
        return done.adapter
