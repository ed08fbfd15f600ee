"""What the HTTP edge sees of the engine, wherever it runs: behind a socket, or in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

from loraplex.server.messages import AdapterInfo, AdapterRef, EngineInfo, EngineStats, Generate, TokenOutput

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]
StatsCallback = Callable[[EngineStats], None]


class EngineClient(Protocol):
    """Speaks to one engine. ``info`` is valid once ``state`` has been ``ready``; ``stats`` is the last snapshot."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def on_stats(self) -> list[StatsCallback]:
        """Called, in the event loop, with every snapshot that arrives."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def generate(self, command: Generate) -> AsyncGenerator[TokenOutput, None]:
        """Yields until each of the ``n`` choices has had its ``finish_reason``. Closing it early aborts the request.

        Raises:
            LoraplexError: the request failed, all its choices at once.
        """
        ...

    def abort_choice(self, request_id: str, index: int) -> None:
        """One choice is over for the client; the generator counts it as finished."""
        ...

    async def load_adapter(self, ref: AdapterRef) -> AdapterInfo: ...

    async def unload_adapter(self, ref: AdapterRef) -> None: ...

    async def list_adapters(self) -> list[AdapterInfo]: ...
