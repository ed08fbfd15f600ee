"""Puts the HTTP side of a server together from its settings: tokenizer, registered adapters, app.

Imports transformers and with it torch; ``serve.py`` imports this module while the engine process starts.
"""

from __future__ import annotations

from pathlib import Path

import structlog
import uvicorn

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import find_adapters
from loraplex.memory.adapter_source import resolve_source
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.adapter_watch import AdapterWatch
from loraplex.server.app import MakeWatch, create_app
from loraplex.server.checkpoint import find_checkpoint, read_config
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import AdapterInvalidError
from loraplex.server.folder_scan import Scan, scan_folder
from loraplex.server.http_server import DrainingServer
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.registry_file import RegistryFile, SavedAdapter
from loraplex.server.settings import Settings
from loraplex.server.tokens import load_tokenizer
from loraplex.server.tracing import make_tracing

_log = structlog.get_logger(__name__)
_KEEP_ALIVE_SECONDS = 75


def make_server(engine: EngineClient, settings: Settings) -> tuple[DrainingServer, tuple[str, ...]]:
    """The server, not listening yet, and the names of the adapters.

    Raises:
        LoraplexError: the model, an adapter folder or the state folder cannot be served.
    """
    folder = find_checkpoint(settings.model)
    read_config(folder)  # without one, the tokenizer's complaint would be about something else
    tokenizer = load_tokenizer(folder)
    registry = AdapterRegistry(settings.model_name)
    registered = register_adapters(registry, settings)
    config = settings.http_config()
    state = None if settings.state_dir is None else RegistryFile(settings.state_dir)
    if state is not None:
        restore_adapters(registry, state, SourceRules(config.adapter_roots, config.adapter_sources))
    lifecycle = Lifecycle()
    app = create_app(
        engine,
        registry,
        tokenizer,
        config,
        lifecycle=lifecycle,
        state=state,
        watch=_watch(settings, registered) if settings.watch else None,
        tracing=make_tracing(settings.otlp_endpoint),
    )
    uvicorn_config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS)
    server = DrainingServer(
        uvicorn_config, lifecycle, drain_seconds=settings.drain_seconds, linger_seconds=settings.linger_seconds
    )
    return server, tuple(adapter.ref.name for adapter in registry)


def register_adapters(registry: AdapterRegistry, settings: Settings) -> Scan:
    """Register what the settings name, without reading it. Returns what was found in the folder of adapters.

    Raises:
        AdapterInvalidError: a folder is not there, or a source is none.
    """
    found: Scan = {}
    if settings.adapters is not None:
        root = settings.adapters.absolute()
        try:
            found = scan_folder(root)
            listed = find_adapters(root)
        except AdapterFileError as error:
            raise AdapterInvalidError(f"adapters: {error.message}", param="adapters") from error
        except OSError as error:
            reason = f"adapters: {settings.adapters} cannot be listed: {error.strerror}"
            raise AdapterInvalidError(reason, param="adapters") from error
        for warning in listed.warnings:
            _log.warning("an adapter folder is left out", reason=warning)
        registry.register_all([registry.new_ref(name, str(path)) for name, path in listed.paths.items()])
    named = {name: _named_path(name, path) for name, path in settings.named_adapters.items()}
    registry.register_all([registry.new_ref(name, path) for name, path in named.items()], "setting")
    return found


def restore_adapters(registry: AdapterRegistry, state: RegistryFile, rules: SourceRules) -> None:
    """Register what the state folder holds; a name that was registered over HTTP stands for that again."""
    for saved in state.read():
        if saved.origin in {"folder", "setting"}:
            _restore_wishes(registry, saved)
        elif problem := _problem(registry, state, saved, rules):
            _log.warning("a saved adapter is left out", adapter=saved.name, reason=problem)
            state.pass_over(saved)
        else:
            registry.register(
                registry.new_ref(saved.name, _saved_path(state, saved)),
                created=saved.created,
                pinned=saved.pinned,
                tags=saved.tags,
                origin=saved.origin,
                identity_before=saved.identity,
            )
    state.sweep(adapter.ref.path for adapter in registry)


def _restore_wishes(registry: AdapterRegistry, saved: SavedAdapter) -> None:
    known = registry.get(saved.name)
    if known is not None and known.ref.path == saved.path:
        registry.change(saved.name, pinned=saved.pinned, tags=saved.tags)


def _saved_path(state: RegistryFile, saved: SavedAdapter) -> str:
    """Uploads lie in the state folder, wherever that was when they came."""
    return str(state.adapters / Path(saved.path).name) if saved.origin == "upload" else saved.path


def _problem(registry: AdapterRegistry, state: RegistryFile, saved: SavedAdapter, rules: SourceRules) -> str | None:
    if saved.name == registry.base_name:
        return "it has the name of the base model"
    if saved.origin == "upload":
        folder = Path(_saved_path(state, saved))
        is_there = folder.name != ".." and folder.parent == state.adapters and folder.is_dir()
        return None if is_there else "its files are gone"
    return None if rules.allows(saved.path) else "'adapter_roots' and 'adapter_sources' do not allow its path"


def _named_path(name: str, path: str) -> str:
    try:
        source = resolve_source(path)
    except AdapterFileError as error:
        raise AdapterInvalidError(f"adapter {name}={error.message}", param="adapter") from error
    if source.is_remote:
        return source.url
    if not Path(source.place).is_dir():
        raise AdapterInvalidError(f"adapter {name}={path}: no such folder", param="adapter")
    return str(Path(source.place).resolve())


def _watch(settings: Settings, registered: Scan) -> MakeWatch:
    assert settings.adapters is not None, "the settings see to it"
    root = settings.adapters.absolute()  # the paths below it must be those that were registered at the start
    return lambda admin: AdapterWatch(admin, root, settings.watch_seconds, registered)
