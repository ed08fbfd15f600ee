"""Runs a server from its settings: the engine, the HTTP edge, and an orderly end.

Both processes import torch and transformers, which takes seconds; so the engine process is started first, and this one
imports its own half meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog

from loraplex.server.engine_client import EngineClient
from loraplex.server.engine_supervisor import ProcessEngine
from loraplex.server.errors import LoraplexError
from loraplex.server.lazy import load
from loraplex.server.progress import Progress
from loraplex.server.settings import Settings, SettingsError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """What is being served, once it is: for whoever greets the user."""

    url: str
    model_name: str
    adapters: tuple[str, ...]


def make_engine(settings: Settings, progress: Progress | None = None) -> EngineClient:
    """The engine that the settings ask for, not started."""
    config = settings.engine_config()
    if settings.engine == "inline":
        engine: EngineClient = load("loraplex.server.engine_inline:InlineEngine")(config, progress)
        return engine
    return ProcessEngine(config, progress, log_level=settings.log_level, log_format=settings.log_format)


async def serve(
    settings: Settings,
    *,
    progress: Progress | None = None,
    on_ready: Callable[[Serving], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. ``/livez`` answers early; ``/health`` is 200 once the engine is ready.

    Args:
        settings: what to serve, and how.
        progress: told of the weights read.
        on_ready: told when the engine is ready.

    Raises:
        LoraplexError: the settings, the model or an adapter folder cannot be served.
    """
    engine = make_engine(settings, progress)
    with _listen(settings.host, settings.port) as listener:
        async with _started(engine) as start:
            make_server = await asyncio.to_thread(load, "loraplex.server.http_stack:make_server")
            server, adapters = await asyncio.to_thread(make_server, engine, settings)
            serving = asyncio.create_task(server.serve([listener]))
            await asyncio.wait((serving, start), return_when=asyncio.FIRST_COMPLETED)
            if start.done() and start.exception() is not None:
                server.should_exit = True
            elif start.done():
                serving_now = Serving(_url(settings, listener), settings.model_name, adapters)
                _log.info("serving", url=serving_now.url, model=settings.model_name, adapters=len(adapters))
                if on_ready is not None:
                    on_ready(serving_now)
            await serving
            if start.done():
                start.result()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; SettingsError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}, port {port}: {error.strerror}", param="port") from error


def _url(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def _started(engine: EngineClient) -> AsyncIterator[asyncio.Task[None]]:
    """The engine's start, under way; the engine is closed at the end, whatever happened."""
    start = asyncio.create_task(engine.start(), name="engine start")
    try:
        yield start
    finally:
        if not start.done():
            start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        with contextlib.suppress(LoraplexError):
            await engine.close()
