"""What registrations cost the HTTP process: to find, register, list, restore, save and read them again."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_view import AdapterView
from loraplex.server.folder_scan import SettledChanges, scan_folder
from loraplex.server.http_stack import register_adapters
from loraplex.server.messages import AdapterInfo, AdapterState
from loraplex.server.registry_file import RegistryFile, saved_adapters
from loraplex.server.settings import Settings

_PAGE = 100


def registry_costs(folder: Path, model: Path, *, inline: bool) -> dict[str, float]:
    """Seconds and bytes, measured in a process of its own.

    Args:
        folder: of adapter folders.
        model: the base's checkpoint.
        inline: measured in this process instead, where bytes say little.
    """
    if inline:
        return _measure(folder, model)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measure, folder, model).result()


def _measure(folder: Path, model: Path) -> dict[str, float]:
    found: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        found[f"{name}_s"] = time.perf_counter() - started
        return result

    process = psutil.Process()
    settings = Settings.model_validate({"model": str(model), "adapters": folder})
    registry = AdapterRegistry("base")
    before = process.memory_info().rss
    scan = timed("register", lambda: register_adapters(registry, settings))
    count = found["registered"] = len(registry)
    found["bytes_per_registration"] = (process.memory_info().rss - before) / count
    timed("list_all_pages", lambda: _list(registry))
    changes = SettledChanges(dict(scan))
    timed("watch_scan", lambda: scan_folder(folder))
    timed("watch_compare", lambda: changes.of(scan))
    view, states = AdapterView(), [_state(one.ref.path, one.ref.revision) for one in registry]
    before = process.memory_info().rss
    timed("hear_states_of_all", lambda: _hear(view, registry, states))
    found["bytes_per_adapter_read"] = (process.memory_info().rss - before) / count
    timed("restore_message", registry.restored)
    with tempfile.TemporaryDirectory() as kept:
        for one in list(registry):
            registry.change(one.ref.name, origin="api")
        file = RegistryFile(Path(kept))
        saved = timed("save_rows", lambda: saved_adapters(registry))
        timed("save_file", lambda: file.write(saved))
        timed("read_file", file.read)
        file.close()
    return found


def _hear(view: AdapterView, registry: AdapterRegistry, states: Sequence[AdapterState]) -> None:
    view.update(states)
    registry.note(states)


def _list(registry: AdapterRegistry) -> None:
    after: str | None = None
    while True:
        page, has_more = registry.listed(after=after, limit=_PAGE)
        if not has_more:
            return
        after = page[-1].ref.name


def _state(path: str, revision: int) -> AdapterState:
    info = AdapterInfo(
        identity=f"{revision:064x}", kind="lora", rank=8, targets=["q_proj", "v_proj"], bytes=622_592, pages=38
    )
    return AdapterState(path=path, revision=revision, tier="host", info=info)
