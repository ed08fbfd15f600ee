"""A server for everything to go wrong with: many adapters on small tiers, and reads that can be slowed down."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loraplex.server.demo.assets import base_folder

COPIES = 5
HOST_BYTES = 800_000
"""Room for three of the larger adapters among ``folders.TASKS``."""

POOL_BYTES = 1_200_000
"""Room for two of them and a few sequences."""


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(f"tests_chaos_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load() -> Any:
    """The module ``load.py``."""
    return load_beside("load")


@pytest.fixture(scope="session")
def folders() -> Any:
    """The module ``folders.py``."""
    return load_beside("folders")


class Slowness:
    """Makes a server's reads of adapters whose folder's name holds ``slow`` take long."""

    def __init__(self, root: Path, folders: Any) -> None:
        self._file = root / "seconds"
        (root / "sitecustomize.py").write_text(folders.SLOW_SITE, encoding="utf-8")
        self.environment = {"PYTHONPATH": str(root), folders.SLOW_FILE: str(self._file)}

    def begin(self, seconds: float) -> None:
        """From now on each file takes so long to open."""
        self._file.write_text(str(seconds), encoding="utf-8")

    def end(self) -> None:
        """Whoever is waiting goes on at once."""
        self._file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def slowness(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> Slowness:
    return Slowness(tmp_path_factory.mktemp("site"), folders)


@pytest.fixture(scope="session")
def start_small(start_server: Callable[..., Any], slowness: Slowness) -> Callable[..., Any]:
    """Starts a server over a folder of adapters, or none, with small tiers."""

    def start(adapters: Path | None, *more: str, env: Mapping[str, str] = {}) -> Any:
        arguments = ["serve", str(base_folder()), "--served-model-name", "loraplex-demo", "--dtype", "float32"]
        arguments += [] if adapters is None else ["--adapters", str(adapters)]
        sizes = ["--pool-bytes", str(POOL_BYTES), "--host-adapter-bytes", str(HOST_BYTES), "--max-model-len", "256"]
        return start_server(*arguments, *sizes, "--threads", "1", *more, env={**slowness.environment, **env})

    return start


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> Any:
    """The folder of adapters of the server ``chaos``."""
    return folders.AdapterFolders(tmp_path_factory.mktemp("chaos") / "adapters", COPIES)


@pytest.fixture
def adapters(adapter_folders: Any) -> Iterator[Any]:
    """The same, whole again after each test."""
    yield adapter_folders
    adapter_folders.mend_all()


class LastingServer:
    """A server that is started when first asked for, and again should a test have ended it.

    Args:
        start: starts one.
        state: folder of what it keeps.
    """

    def __init__(self, start: Callable[[], Any], state: Path) -> None:
        self.state = state
        self._start = start
        self._server: Any = None

    def ready(self) -> Any:
        if self._server is None or not self._server.is_alive:
            self._server = self._start()
        return self._server.wait_until_ready()

    def stop(self) -> None:
        if self._server is not None and self._server.is_alive:
            assert self._server.stop() == 0, self._server.log[-4000:]


@pytest.fixture(scope="session")
def chaos_server(
    start_small: Callable[..., Any], adapter_folders: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LastingServer]:
    state = tmp_path_factory.mktemp("chaos-state")
    server = LastingServer(lambda: start_small(adapter_folders.root, "--state-dir", str(state)), state)
    yield server
    server.stop()


@pytest.fixture
def chaos(chaos_server: LastingServer) -> Any:
    """A server with 30 adapters, a host store for three of them, a pool for two and a folder for its state."""
    return chaos_server.ready()
