"""Puts the HTTP side of a server together from its settings: tokenizer, registered adapters, app.

Imports transformers and with it torch; ``serve.py`` imports this module while the engine process starts.
"""

from __future__ import annotations

from pathlib import Path

import structlog
import uvicorn

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import find_adapters
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.app import create_app
from loraplex.server.checkpoint import find_checkpoint, read_config
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import AdapterInvalidError
from loraplex.server.http_server import DrainingServer
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.settings import Settings
from loraplex.server.tokens import load_tokenizer

_log = structlog.get_logger(__name__)
_KEEP_ALIVE_SECONDS = 75


def make_server(engine: EngineClient, settings: Settings) -> tuple[DrainingServer, tuple[str, ...]]:
    """The server, not listening yet, and the names of the adapters.

    Raises:
        LoraplexError: the model or an adapter folder cannot be served.
    """
    registry = AdapterRegistry(settings.model_name)
    register_adapters(registry, settings)
    folder = find_checkpoint(settings.model)
    read_config(folder)  # without one, the tokenizer's complaint would be about something else
    tokenizer = load_tokenizer(folder)
    lifecycle = Lifecycle()
    app = create_app(engine, registry, tokenizer, settings.http_config(), lifecycle=lifecycle)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS)
    server = DrainingServer(config, lifecycle, drain_seconds=settings.drain_seconds)
    return server, tuple(ref.name for ref in registry.refs())


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
