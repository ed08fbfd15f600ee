"""Whether the server takes new work, and what of it is still open."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import UnavailableError


@dataclass(slots=True)
class Lifecycle:
    """Serving, then leaving, then draining, then expired; it never goes back.

    Leaving: all work is taken, but whoever chooses among servers should choose another. Draining: new work is refused,
    open work goes on. Expired: open work is cancelled, and its clients are told.
    """

    leaving: bool = False
    draining: bool = False
    drain_began: float | None = None
    expired: bool = False
    _open: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def in_flight(self) -> int:
        """Requests that are being worked on."""
        return len(self._open)

    def leave(self) -> None:
        """From now on the server is not ready, and closes connections with their answers. Safe in a signal handler."""
        self.leaving = True

    def begin_drain(self) -> None:
        """From now on new work is refused. Safe to call from a signal handler."""
        self.leaving = self.draining = True
        self.drain_began = self.drain_began or time.monotonic()

    def seconds_left(self, drain_seconds: float) -> float:
        """How long what is left to do at the end may take: what is left of the drain, from half a second to five."""
        gone = 0.0 if self.drain_began is None else time.monotonic() - self.drain_began
        return max(0.5, min(5.0, drain_seconds - gone))

    def expire(self) -> None:
        """Ends what is still open. To be called in the event loop."""
        self.leaving = self.draining = self.expired = True
        for task in self._open:
            task.cancel()

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """One request in flight, in the current task.

        Raises:
            UnavailableError: the server is draining.
        """
        task = asyncio.current_task()
        if self.draining or task is None:
            raise stopping_error()
        self._open.add(task)
        try:
            yield
        finally:
            self._open.discard(task)


def stopping_error() -> UnavailableError:
    """What clients of a stopping server hear."""
    return UnavailableError("The server is shutting down.")


def check_ready(engine: EngineClient) -> None:
    """Refuses work while there is no engine to do it.

    Raises:
        UnavailableError: the engine is starting, restarting, failed or stopped.
    """
    if engine.state != "ready":
        raise UnavailableError(f"The engine is not ready: {engine.state}.")
