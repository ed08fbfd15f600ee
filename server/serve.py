"""Runs a server from its settings: the engine, the adapters, the HTTP edge, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import find_adapters
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.app import create_app
from loraplex.server.checkpoint import find_checkpoint
from loraplex.server.engine_client import EngineClient
from loraplex.server.engine_inline import InlineEngine
from loraplex.server.engine_supervisor import ProcessEngine
from loraplex.server.errors import AdapterInvalidError, LoraplexError
from loraplex.server.http_server import DrainingServer
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.settings import Settings, SettingsError
from loraplex.server.tokens import load_tokenizer
from loraplex.server.weights import Progress

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """What is being served, once it is: for whoever greets the user."""

    url: str
    model_name: str
    adapters: tuple[str, ...]


def register_adapters(registry: AdapterRegistry, settings: Settings) -> None:
    """Register what the settings name, without reading it; AdapterInvalidError for a folder that is not there."""
    paths: dict[str, str] = {}
    if settings.adapters is not None:
        try:
            found = find_adapters(settings.adapters)
        except AdapterFileError as error:
            raise AdapterInvalidError(f"adapters: {error.message}", param="adapters") from error
        for warning in found.warnings:
            _log.warning("an adapter folder is left out", reason=warning)
        paths |= {name: str(path) for name, path in found.paths.items()}
    for name, path in settings.named_adapters.items():
        if not Path(path).is_dir():
            raise AdapterInvalidError(f"adapter {name}={path}: no such folder", param="adapter")
        paths[name] = str(Path(path).resolve())
    registry.register_all([registry.new_ref(name, path) for name, path in paths.items()])


def make_engine(settings: Settings, progress: Progress | None = None) -> EngineClient:
    """The engine that the settings ask for, not started."""
    config = settings.engine_config()
    if settings.engine == "inline":
        return InlineEngine(config, progress)
    return ProcessEngine(config, progress, log_level=settings.log_level, log_format=settings.log_format)


async def serve(
    settings: Settings,
    *,
    progress: Progress | None = None,
    on_ready: Callable[[Serving], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. The port answers from the start; ``/health`` is 200 once ready.

    Args:
        settings: what to serve, and how.
        progress: told of the weights read.
        on_ready: told when the engine is ready.

    Raises:
        LoraplexError: the settings, the model or an adapter folder cannot be served.
    """
    folder = find_checkpoint(settings.model)
    registry = AdapterRegistry(settings.model_name)
    register_adapters(registry, settings)
    tokenizer = await asyncio.to_thread(load_tokenizer, folder)
    engine = make_engine(settings, progress)
    lifecycle = Lifecycle()
    app = create_app(engine, registry, tokenizer, settings.http_config(), lifecycle=lifecycle)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=75)
    server = DrainingServer(config, lifecycle, drain_seconds=settings.drain_seconds)
    with _listen(settings.host, settings.port) as listener:
        async with _started(engine) as start:
            serving = asyncio.create_task(server.serve([listener]))
            await asyncio.wait((serving, start), return_when=asyncio.FIRST_COMPLETED)
            if start.done() and start.exception() is not None:
                server.should_exit = True
            elif start.done() and on_ready is not None:
                url = f"http://{settings.host}:{listener.getsockname()[1]}"
                on_ready(Serving(url, settings.model_name, tuple(ref.name for ref in registry.refs())))
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
