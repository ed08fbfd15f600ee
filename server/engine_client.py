"""What the HTTP edge sees of the engine, wherever it runs: behind a socket, or in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection
from typing import Literal, Protocol

from loraplex.server.adapter_view import AdapterView
from loraplex.server.messages import (
    AdapterInfo,
    AdapterRef,
    EngineInfo,
    EngineStats,
    Generate,
    RestoredAdapter,
    TokenOutput,
)

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]
StatsCallback = Callable[[EngineStats], None]
Restore = Callable[[], list[RestoredAdapter]]
"""What a new engine is to know of the registrations."""

TargetTier = Literal["host", "pool"]


class EngineClient(Protocol):
    """Speaks to one engine. ``info`` is valid once ``state`` has been ``ready``; ``stats`` is the last snapshot."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def restarts(self) -> int:
        """How often the engine was started again."""
        ...

    @property
    def adapters(self) -> AdapterView:
        """Where the registered adapters have come to."""
        ...

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

    def running(self, ref: AdapterRef) -> int:
        """Open requests of a registration, those that wait for it among them."""
        ...

    @property
    def wanted(self) -> Collection[tuple[str, int]]:
        """Path and revision of the adapters that open requests ask for, those asked for longest first."""
        ...

    def restore_from(self, restore: Restore) -> None:
        """Tell the engine that runs, and every later one before anything else, what ``restore`` returns then.

        To be called in the event loop.
        """
        ...

    async def load_adapter(self, ref: AdapterRef) -> AdapterInfo:
        """Read and verify an adapter. LoraplexError where it cannot be served."""
        ...

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Forget a registration; its running requests finish."""
        ...

    async def pin_adapter(self, ref: AdapterRef, pinned: bool) -> AdapterInfo | None:
        """Bring an adapter into the pool and keep it there, or keep it no longer.

        Returns:
            What it is; None where it is let go and was never read.
        """
        ...

    async def prefetch_adapter(self, ref: AdapterRef, tier: TargetTier) -> AdapterInfo:
        """Bring an adapter up to a tier, without keeping it there."""
        ...
