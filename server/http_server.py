"""A uvicorn server that drains before it stops."""

from __future__ import annotations

import math
import time
from types import FrameType

import uvicorn

from loraplex.server.lifecycle import Lifecycle

CLOSE_SECONDS = 1


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT it goes on answering, with 503 to new work, until nothing is in flight.

    For the first ``linger_seconds`` it takes new work all the same, but is not ready and closes each connection with
    its answer: load balancers take a while to notice, and connections that clients keep open would bring work until
    the end. What is still open ``drain_seconds`` after that is ended with an error that its clients hear. A second
    signal does so at once. Either way ``serve`` returns and the process ends as its caller decides: the signal is not
    raised again.
    """

    def __init__(
        self, config: uvicorn.Config, lifecycle: Lifecycle, *, drain_seconds: float, linger_seconds: float = 0.0
    ) -> None:
        config.timeout_graceful_shutdown = CLOSE_SECONDS
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._linger_seconds = linger_seconds
        self._drain_from = math.inf
        self._deadline = math.inf
        self._released = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal came. Only flags are set here: it may interrupt anything."""
        if self._lifecycle.leaving:
            self._drain_from = self._deadline = 0.0
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """What the first signal does."""
        self._lifecycle.leave()
        if not self._linger_seconds:
            self._lifecycle.begin_drain()
        self._drain_from = time.monotonic() + self._linger_seconds
        self._deadline = self._drain_from + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; true ends the serving."""
        if time.monotonic() >= self._drain_from:
            self._lifecycle.begin_drain()
            self._release_connections()
            if time.monotonic() >= self._deadline:
                self._lifecycle.expire()
                self.should_exit = True
            elif self._lifecycle.in_flight == 0:
                self.should_exit = True
        return await super().on_tick(counter)

    def _release_connections(self) -> None:
        """Once: idle connections close, others after the answer under way, which may have begun before the signal."""
        if not self._released:
            self._released = True
            for connection in list(self.server_state.connections):
                connection.shutdown()
