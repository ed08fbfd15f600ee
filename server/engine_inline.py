"""The engine in a thread of this process: for tests, notebooks and debuggers. Same contract as behind a socket."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence

import structlog

from loraplex.server.engine import Engine
from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.engine_loop import run_engine
from loraplex.server.engine_session import EngineSession
from loraplex.server.errors import LoraplexError, UnavailableError
from loraplex.server.messages import Command, Event, Shutdown
from loraplex.server.progress import Progress

_log = structlog.get_logger(__name__)


class QueuePort:
    """The engine's end of two queues within one process.

    Args:
        deliver: takes events; called in the engine's thread.
    """

    def __init__(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._deliver = deliver

    def put(self, command: Command) -> None:
        self._commands.put(command)

    def wake(self) -> None:
        """End a ``receive`` that waits."""
        self._commands.put(None)

    def receive(self, timeout: float | None) -> Sequence[Command]:
        found: list[Command] = []
        try:
            first = self._commands.get(timeout != 0, timeout)
            found += [] if first is None else [first]
            while True:
                more = self._commands.get_nowait()
                found += [] if more is None else [more]
        except queue.Empty:
            return found

    def send(self, events: Sequence[Event]) -> None:
        self._deliver(events)


class InlineEngine(EngineSession):
    """An ``EngineClient`` whose engine is a thread of this process.

    Args:
        config: of the engine.
        progress: told of the weights read, in the engine's thread.

    Attributes:
        engine: once it is built; touch it only while it is idle.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._port = QueuePort(self._deliver_from_thread)
        super().__init__(self._port.put, progress)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.engine: Engine | None = None

    async def start(self) -> None:
        """Read the model and start to serve; LoraplexError where that cannot be."""
        self._loop = asyncio.get_running_loop()
        ready = self._expect_ready()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        await ready

    async def close(self) -> None:
        """Stop the engine; open requests end with an error."""
        if self._thread is not None:
            self._port.put(Shutdown())
            await asyncio.to_thread(self._thread.join)
        if self.state != "failed":
            self.state = "stopped"
        self._requests.fail_all(lambda: UnavailableError("The engine has stopped."))

    def _run(self) -> None:
        try:
            self.engine = build_engine(self._config, progress=self._progress, on_change=self._port.wake)
        except LoraplexError as error:
            self._call_in_loop(self._fail, error)
            return
        try:
            run_engine(self.engine, self._port)
        except Exception as error:
            _log.exception("the engine died")
            self._call_in_loop(self._fail, UnavailableError(f"The engine died: {type(error).__name__}."))
        finally:
            self.engine.close()

    def _fail(self, error: LoraplexError) -> None:
        self.state = "failed"
        self._end_start(error)
        self._requests.fail_all(lambda: UnavailableError(error.message))

    def _deliver_from_thread(self, events: Sequence[Event]) -> None:
        self._call_in_loop(self._deliver_all, events)

    def _deliver_all(self, events: Sequence[Event]) -> None:
        for event in events:
            self._deliver(event)

    def _call_in_loop(self, function: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
