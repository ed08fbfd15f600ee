"""The engine as a process of its own, watched: if it dies, its requests end with an error and it is started again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import msgspec
import structlog
import zmq
import zmq.asyncio

from loraplex.server.engine_config import EngineArguments, EngineConfig
from loraplex.server.engine_session import EngineSession
from loraplex.server.errors import EngineError, LoraplexError, UnavailableError
from loraplex.server.messages import Abort, Command, Event, Shutdown
from loraplex.server.progress import Progress
from loraplex.server.socket_folder import SocketFolder

_log = structlog.get_logger(__name__)

_STOP_SECONDS = 5.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
_STABLE_SECONDS = 60.0
"""An engine that served for so long has its next death forgiven without a pause."""


class ProcessEngine(EngineSession):
    """An ``EngineClient`` over ZeroMQ to an engine process that it starts and watches.

    Args:
        config: of the engine.
        progress: told of the weights read.
        log_level, log_format: of the engine's log, which goes to this process's standard error.

    Attributes:
        restarts: how often the engine was started again.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        *,
        log_level: str = "info",
        log_format: str = "console",
    ) -> None:
        super().__init__(self._send, progress)
        self._config = config
        self._log_level = log_level
        self._log_format = log_format
        self._folder: SocketFolder | None = None
        self._context: zmq.asyncio.Context | None = None
        self._commands: zmq.Socket[bytes] | None = None
        self._events: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def pid(self) -> int | None:
        """Of the engine process that runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process and wait until it serves; LoraplexError where it cannot."""
        self._folder = SocketFolder()
        self._context = zmq.asyncio.Context()
        try:
            await self._launch()
        except BaseException:
            self.state = "failed"
            await self._release()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="engine watcher")

    async def close(self) -> None:
        """Stop the process; open requests end with an error."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self.state != "failed":
            self.state = "stopped"
        await self._stop_process()
        await self._release()
        self._requests.fail_all(lambda: UnavailableError("The engine has stopped."))

    def _send(self, command: Command) -> None:
        if self.state != "ready" or self._commands is None:
            if isinstance(command, Abort):
                return  # it died with the engine
            raise UnavailableError(f"The engine is not ready: {self.state}.")
        self._commands.send(self._encoder.encode([command]), zmq.NOBLOCK)

    async def _launch(self) -> None:
        """Start one process with fresh sockets and wait until it is ready."""
        assert self._context is not None
        assert self._folder is not None
        self._close_sockets()
        names = [f"ipc://{self._folder.path}/{self.restarts}-{kind}" for kind in ("commands", "events")]
        self._commands = zmq.Socket(self._context, zmq.PUSH)
        self._commands.set_hwm(0)
        self._commands.bind(names[0])
        self._events = self._context.socket(zmq.PULL)
        self._events.set_hwm(0)
        self._events.bind(names[1])
        arguments = EngineArguments(
            config=self._config,
            commands=names[0],
            events=names[1],
            log_level=self._log_level,
            log_format=self._log_format,
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loraplex.server.engine_process",
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(arguments) + b"\n")
        ready = self._expect_ready()
        self._reader = asyncio.create_task(self._read(self._events), name="engine events")
        try:
            await self._wait_until_ready(ready)
        except BaseException:
            self._reader.cancel()
            await self._stop_process()
            raise

    async def _wait_until_ready(self, ready: asyncio.Future[None]) -> None:
        assert self._process is not None
        death = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait((ready, death), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await asyncio.sleep(0.1)  # its last words may still be on their way
            if not ready.done():
                raise EngineError(f"The engine process ended while it started ({_describe(death.result())}).")
            await ready
        finally:
            death.cancel()
            if not ready.done():
                ready.cancel()

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(list[Event])
        while True:
            frame = await socket.recv()
            for event in decoder.decode(frame):
                self._deliver(event)

    async def _watch(self) -> None:
        """Start the engine again whenever it dies."""
        pause = _FIRST_PAUSE
        while True:
            assert self._process is not None
            started = time.monotonic()
            status = await self._process.wait()
            self._bury(status)
            if time.monotonic() - started > _STABLE_SECONDS:
                pause = _FIRST_PAUSE
            while self.state != "ready":
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                await self._relaunch()

    def _bury(self, status: int) -> None:
        self.state = "restarting"
        if self._reader is not None:
            self._reader.cancel()
        _log.error("the engine process died; starting it again", status=_describe(status))
        self._requests.fail_all(
            lambda: UnavailableError(f"The engine process died ({_describe(status)}) and is being started again.")
        )

    async def _relaunch(self) -> None:
        self.restarts += 1
        try:
            await self._launch()
        except LoraplexError as error:
            _log.error("the engine could not be started again", error=error.message)

    async def _stop_process(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if self._commands is not None:
            with contextlib.suppress(zmq.Again):
                self._commands.send(self._encoder.encode([Shutdown()]), zmq.NOBLOCK)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _release(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._close_sockets()
        if self._context is not None:
            self._context.term()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _close_sockets(self) -> None:
        for socket in (self._commands, self._events):
            if socket is not None:
                socket.close(linger=0)
        self._commands = self._events = None


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
