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

    What is still open after ``drain_seconds`` is ended with an error that its clients hear. A second signal does so at
    once. Either way ``serve`` returns and the process ends as its caller decides: the signal is not raised again.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, *, drain_seconds: float) -> None:
        config.timeout_graceful_shutdown = CLOSE_SECONDS
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._deadline = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal came. Only flags are set here: it may interrupt anything."""
        if self._lifecycle.draining:
            self._deadline = 0.0
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """What the first signal does."""
        self._lifecycle.begin_drain()
        self._deadline = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; true ends the serving."""
        if self._lifecycle.draining:
            if time.monotonic() >= self._deadline:
                self._lifecycle.expire()
                self.should_exit = True
            elif self._lifecycle.in_flight == 0:
                self.should_exit = True
        return await super().on_tick(counter)
