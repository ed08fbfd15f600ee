"""Two real servers, as a cluster would see two replicas, for tests that read and call them as cluster components do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loraplex.server.demo.assets import adapters_folder

COMMAND = Path(sys.executable).with_name("loraplex")
START_SECONDS = 120
GREETING = re.compile(r"^ +(http://\S+)  \(Ctrl-C", re.MULTILINE)


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


class Replica:
    """A ``loraplex demo`` with ``--metrics-compat vllm``."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log.txt"
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("LORAPLEX_")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [COMMAND, "demo", "--port", "0", "--metrics-compat", "vllm", "--threads", "1", "--max-running", "2"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=kept,
                start_new_session=True,
            )
        self.url = ""

    def wait_until_ready(self) -> Replica:
        """Read the greeting."""
        eventually(lambda: GREETING.search(self.log) or self.process.poll() is not None, START_SECONDS)
        found = GREETING.search(self.log)
        assert found, self.log
        self.url = found[1]
        return self

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def call(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=60, verify=False, **options)

    def ask(self, model: str, **fields: Any) -> httpx2.Response:
        """A chat request, which names its adapter as its model, as all that goes through a router does."""
        messages = [{"role": "user", "content": "adapter"}]
        body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0} | fields
        return self.call("POST", "/v1/chat/completions", json=body)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas, which tests leave with the adapters that they found registered."""
    started = [Replica(tmp_path_factory.mktemp("replica")) for _ in range(2)]
    try:
        first, second = (one.wait_until_ready() for one in started)
        yield first, second
    finally:
        for one in started:
            one.end()


@pytest.fixture
def replica(replicas: tuple[Replica, Replica]) -> Iterator[Replica]:
    """One of them, which forgets the adapters that a test has loaded."""
    first, _ = replicas
    before = {model["id"] for model in first.call("GET", "/v1/models").json()["data"]}
    yield first
    for model in first.call("GET", "/v1/models").json()["data"]:
        if model["id"] not in before:
            with suppress(httpx2.HTTPError):
                first.call("POST", "/v1/unload_lora_adapter", json={"lora_name": model["id"]})


@pytest.fixture
def wait_until() -> Callable[..., bool]:
    """``wait_until(condition, seconds)``: whether it comes true in time."""
    return eventually


@pytest.fixture(scope="session")
def adapter_path() -> Callable[[str], str]:
    """The folder of one of the demo's adapters."""
    return lambda name: str(adapters_folder() / name)
