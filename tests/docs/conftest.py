"""Pages are tried as they stand, against one demo server. ``markdown.py`` says how a page tells what is to be done."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest

from loraplex.clients.client import Client
from loraplex.server.demo.assets import adapters_folder, demo_adapters, kind_adapters

COMMAND = Path(sys.executable).with_name("loraplex")
START_SECONDS = 120
GREETING = re.compile(r"^ +http://(\S+)  \(Ctrl-C", re.MULTILINE)
CLIENT_PYTHON = "DOCS_CLIENT_PYTHON"
"""Environment variable: an interpreter with the clients that the tests do without; ``make docs-test`` sets it."""


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(f"tests_docs_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``page``: each page. ``run_page``: each that has something to run."""
    markdown = load_beside("markdown")
    pages = [markdown.read_page(path) for path in markdown.page_paths()]
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", pages, ids=lambda page: page.name)
    if "run_page" in metafunc.fixturenames:
        running = [page for page in pages if any(block.is_run for block in page.blocks)]
        metafunc.parametrize("run_page", running, ids=lambda page: page.name)


@pytest.fixture(scope="session")
def markdown() -> ModuleType:
    """``markdown.py``."""
    return load_beside("markdown")


@pytest.fixture(scope="session")
def running() -> ModuleType:
    """``runner.py``."""
    return load_beside("runner")


@pytest.fixture(scope="session")
def pages(markdown: ModuleType) -> list[Any]:
    """All pages."""
    return [markdown.read_page(path) for path in markdown.page_paths()]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of ``loraplex demo`` with a state folder, which drains in time at the end."""
    folder = tmp_path_factory.mktemp("docs-server")
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("LORAPLEX_")}
    arguments = [
        "demo",
        "--port",
        "0",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--state-dir",
        str(folder / "state"),
        "--threads",
        "1",
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := GREETING.search(log.read_text())) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        assert found, log.read_text()
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def runner(server: str, running: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs blocks. Pages find under ``/srv`` adapters of the demo under the names that pages give them."""
    files = tmp_path_factory.mktemp("srv")
    for place, adapter in {
        "adapters/legal": "upper",
        "adapters/legal-v2": "reverse",
        "adapters/shout": "upper",
    }.items():
        shutil.copytree(adapters_folder() / adapter, files / place)
    runner = running.Runner(server, files, os.environ.get(CLIENT_PYTHON))
    yield runner
    runner.close()


@pytest.fixture
def tidy(server: str) -> Iterator[None]:
    """The server has its own adapters again after the test."""
    yield
    own = {*demo_adapters(), *kind_adapters()}
    with Client(f"http://{server}") as client:
        for adapter in [*client.list_adapters()]:
            if adapter.name not in own:
                client.unload_adapter(adapter.name)


@pytest.fixture(scope="session")
def metric_names(server: str) -> set[str]:
    """Names of the families and samples of ``/metrics``."""
    text = httpx2.get(f"http://{server}/metrics", headers={"accept": "text/plain"}).text
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    samples = set(re.findall(r"^([a-z]\w*)[ {]", text, re.MULTILINE))
    return families | samples | {name.removesuffix("_total") for name in families}
