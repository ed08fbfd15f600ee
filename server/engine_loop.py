"""Drives an engine: commands in, a step, events out, and sleep only while there is nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loraplex.server.engine import Engine
from loraplex.server.messages import Command, Event, Shutdown


class EnginePort(Protocol):
    """The engine's end of a line to its clients."""

    def receive(self, timeout: float | None) -> Sequence[Command]:
        """Commands that have come; waits up to ``timeout`` seconds (None: for ever) for one, or for a wake-up."""

    def send(self, events: Sequence[Event]) -> None: ...


def run_engine(engine: Engine, port: EnginePort) -> None:
    """Serve until ``Shutdown``. A wake-up of the port is due whenever an adapter has been read."""
    port.send([engine.info, engine.stats()])
    while True:
        for command in port.receive(_patience(engine)):
            if isinstance(command, Shutdown):
                return
            engine.handle(command)
        events = engine.step()
        if events:
            port.send(events)


def _patience(engine: Engine) -> float | None:
    """How long to wait for a command. Waiting for a load also ends by itself, should a wake-up get lost."""
    if engine.is_runnable:
        return 0.0
    if engine.has_work:
        return 0.5
    return 1.0 if engine.has_prospects else None
