"""The engine process: ``python -m loraplex.server.engine_process``, started by ``engine_supervisor.py``.

Its configuration comes as one line of JSON on standard input, which then stays open: when it closes, whoever started
the process is gone, and the process ends. Commands and events go over two ZeroMQ sockets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import msgspec
import structlog
import zmq

from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineArguments
from loraplex.server.engine_loop import run_engine
from loraplex.server.errors import LoraplexError
from loraplex.server.logs import configure_logs
from loraplex.server.messages import Command, ErrorInfo, Event, StartFailed, StartProgress

_log = structlog.get_logger(__name__)
_PROGRESS_SECONDS = 0.1


class SocketPort:
    """The engine's end of the sockets, with a pipe by which loader threads end a wait."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], arguments: EngineArguments) -> None:
        self._commands = context.socket(zmq.PULL)
        self._commands.connect(arguments.commands)
        self._events = context.socket(zmq.PUSH)
        self._events.set_hwm(0)
        self._events.connect(arguments.events)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[Command])
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._commands, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def wake(self) -> None:
        """End a ``receive`` that waits. Any thread may call it."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_write, b"!")

    def receive(self, timeout: float | None) -> Sequence[Command]:
        self._poller.poll(None if timeout is None else int(timeout * 1000))
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        found: list[Command] = []
        with contextlib.suppress(zmq.Again):
            while True:
                found += self._decoder.decode(self._commands.recv(zmq.NOBLOCK))
        return found

    def send(self, events: Sequence[Event]) -> None:
        self._events.send(self._encoder.encode(events))

    def close(self) -> None:
        """Close the sockets once what was sent has gone out."""
        self._commands.close(linger=0)
        self._events.close(linger=1000)


def main() -> int:
    """Serve until told to stop; the exit status is 1 if the engine cannot start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the process that supervises this one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    arguments = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineArguments)
    configure_logs(arguments.log_level, arguments.log_format, process="engine")
    threading.Thread(target=_exit_with_parent, name="lifeline", daemon=True).start()
    with zmq.Context() as context:
        port = SocketPort(context, arguments)
        try:
            return _serve(port, arguments)
        finally:
            port.close()


def _serve(port: SocketPort, arguments: EngineArguments) -> int:
    try:
        engine = build_engine(arguments.config, progress=_Progress(port), on_change=port.wake)
    except LoraplexError as error:
        port.send([StartFailed(error=ErrorInfo.of(error))])
        return 1
    try:
        run_engine(engine, port)
    finally:
        engine.close()
    return 0


class _Progress:
    """Sends the progress of the start, not too often."""

    def __init__(self, port: SocketPort) -> None:
        self._port = port
        self._sent_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._sent_at >= _PROGRESS_SECONDS:
            self._sent_at = now
            self._port.send([StartProgress(done=done, total=total)])


def _exit_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not through sys.stdin, whose lock a dying interpreter wants
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
