"""Real servers: the command ``loraplex`` as a process, its address read from its greeting, its log kept in a file.

Starting one takes seconds, so tests share them: a fixture per kind of server, started when first asked for, and again
should a test have ended it. While one kind is in use, the next one that the collected tests need is already starting.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from loraplex.clients.async_client import AsyncClient
from loraplex.clients.client import Client
from loraplex.server.demo.assets import adapters_folder, base_folder, demo_adapters

COMMAND = Path(sys.executable).with_name("loraplex")
START_SECONDS = 120
STOP_SECONDS = 30
NUM_REGISTERED = 2000
GUARD_KEYS = ("first-key", "second-key")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
GREETING = re.compile(r"^ +(http://\S+)  \(Ctrl-C", re.MULTILINE)


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def clean_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment without settings of ours, but for the extra ones."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("LORAPLEX_")}
    return kept | dict(extra)


class Metrics:
    """One scrape of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name which have those labels; fails if there is none."""
        found = [one.value for one in self._samples if one.name == name and labels.items() <= one.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(found)


class Server:
    """A ``loraplex`` process and the ways to speak to it."""

    def __init__(self, arguments: Sequence[str], folder: Path, env: Mapping[str, str] = {}, key: str = "none") -> None:
        self.key = key
        self.log_file = folder / "log.txt"
        self.arguments = arguments
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(env),
                start_new_session=True,  # a Ctrl-C at the tests must not drain the servers behind their back
            )
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def engine_pid(self) -> int:
        """Of the engine process that runs now."""
        children = psutil.Process(self.process.pid).children()
        [engine] = [child for child in children if "loraplex.server.engine_process" in child.cmdline()]
        return engine.pid

    def wait_until_ready(self) -> Server:
        """Read the greeting and see that the server is healthy."""
        eventually(lambda: GREETING.search(self.log) or not self.is_alive, START_SECONDS)
        found = GREETING.search(self.log)
        assert found, f"{self.arguments} did not start:\n{self.log}"
        self.url = found[1]
        assert self.get("/health").status_code == 200
        return self

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return httpx2.request(method, self.url + path, headers=headers, timeout=120, verify=False, **options)

    def get(self, path: str) -> httpx2.Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.request("POST", path, json=body)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The real client, which does not try again unless told to, and reads no certificates."""
        http = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(http_client=http, **self._openai_options(options))

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(http_client=http, **self._openai_options(options))

    def _openai_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, **options}

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"api_key": self.key, "max_retries": 0, **options})

    def async_client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.url, **{"api_key": self.key, "max_retries": 0, **options})

    def ask(self, question: str, adapter: str | None = None, **options: Any) -> str:
        """The greedy answer to one question."""
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "adapter_id": adapter}
        answer = self.post("/v1/chat/completions", body | options)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def model_names(self) -> list[str]:
        """What ``GET /v1/models`` lists."""
        return [model["id"] for model in self.get("/v1/models").json()["data"]]

    def metrics(self) -> Metrics:
        return Metrics(self.get("/metrics").text)

    def is_idle(self) -> bool:
        """Whether nothing runs, nothing waits, and no page holds K/V."""
        metrics = self.metrics()
        busy = ("loraplex_requests_running", "loraplex_requests_waiting", "loraplex_http_requests_in_flight")
        return not any(map(metrics.value, busy)) and metrics.value("loraplex_pool_pages", use="kv") == 0

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def end(self) -> None:
        """Whatever happened, it is gone afterwards; its engine ends with it."""
        if self.is_alive:
            self.process.kill()
        self.process.wait()


class Fleet:
    """The servers of a session, by kind.

    Args:
        kinds: how to start one of each kind, in the order in which tests ask for them.
    """

    def __init__(self, kinds: Mapping[str, Callable[[], Server]]) -> None:
        self._kinds = kinds
        self._started: dict[str, Server] = {}

    def get(self, kind: str) -> Server:
        """A ready server; the next kind is started meanwhile."""
        server = self._start(kind).wait_until_ready()
        following = next((other for other in self._kinds if other not in self._started), None)
        if following is not None:
            self._start(following)
        return server

    def _start(self, kind: str) -> Server:
        if kind not in self._started or not self._started[kind].is_alive:
            self._started[kind] = self._kinds[kind]()
        return self._started[kind]

    def stop(self) -> None:
        """Stop those that still run; each must end with exit status 0."""
        running = [server for server in self._started.values() if server.is_alive]
        try:
            for server in running:
                server.signal(signal.SIGTERM)
            statuses = {" ".join(server.arguments): server.wait() for server in running}
        finally:
            for server in running:
                server.end()
        assert not any(statuses.values()), statuses


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("LORAPLEX_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory, device: Any) -> Iterator[Callable[..., Server]]:
    """Start a server: ``start_server("demo", "--dtype", "float32")``. Not waited for; killed at the end if need be.

    It computes on the device of ``--device``, unless it is told another one.
    """
    started: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        where = [] if "--device" in arguments else ["--device", device.type]
        server = Server([*arguments, "--port", "0", *where], tmp_path_factory.mktemp("server"), **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.end()


@pytest.fixture(scope="session")
def fleet(
    request: pytest.FixtureRequest, start_server: Callable[..., Server], registered_folder: Path, guard_settings: Path
) -> Iterator[Fleet]:
    adapter_bytes = sorted((path / WEIGHTS).stat().st_size for path in demo_adapters().values())
    kinds: dict[str, Callable[[], Server]] = {
        "demo": lambda: start_server("demo", "--dtype", "float32", "--expert-metrics", "3"),
        "guarded": lambda: start_server(
            *("serve", str(base_folder()), "--config", str(guard_settings), "--stream-interval", "4"),
            env={"LORAPLEX_SERVED_MODEL_NAME": "guarded", "LORAPLEX_STREAM_INTERVAL": "5"},
            key=GUARD_KEYS[1],
        ),
        "small_pool": lambda: start_server(
            *("demo", "--dtype", "float32", "--max-model-len", "256", "--drain-seconds", "0.5"),
            *("--pool-bytes", str(int(sum(adapter_bytes[-3:]) * 1.2) + (1 << 20))),
            *("--host-adapter-bytes", str(3 * adapter_bytes[-1])),
        ),
        "mortal": lambda: start_server("demo", "--log-format", "json"),
    }
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    fleet = Fleet({kind: start for kind, start in kinds.items() if kind in needed})
    yield fleet
    fleet.stop()


@pytest.fixture
def demo(fleet: Fleet) -> Server:
    """``loraplex demo`` in float32, for tests that compare numbers, with counts of experts in its metrics.

    Tests leave it as they found it; those that end it come last.
    """
    return fleet.get("demo")


@pytest.fixture
def guarded(fleet: Fleet) -> Server:
    """``loraplex serve`` from a file of settings: API keys, an engine in the same process, 2,000 adapters."""
    return fleet.get("guarded")


@pytest.fixture
def small_pool(fleet: Fleet) -> Server:
    """The demo in a pool and a host store that hold about three of its adapters, with half a second to drain."""
    return fleet.get("small_pool")


@pytest.fixture
def mortal(fleet: Fleet) -> Server:
    """The demo, for tests that kill its engine or itself."""
    return fleet.get("mortal")


@pytest.fixture(scope="session")
def registered_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 adapter folders: links to those of the demo under names of their own."""
    folder = tmp_path_factory.mktemp("thousands") / "adapters"
    folder.mkdir()
    for at in range(NUM_REGISTERED):
        task, path = list(demo_adapters().items())[at % len(demo_adapters())]
        (folder / f"{task}-{at:04}").symlink_to(path, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def guard_settings(tmp_path_factory: pytest.TempPathFactory, registered_folder: Path) -> Path:
    """A file of settings, some of which the environment and flags overrule."""
    file = tmp_path_factory.mktemp("settings") / "server.yaml"
    settings = {
        "adapters": str(registered_folder),
        "adapter": [f"shout={adapters_folder() / 'upper'}"],
        "adapter_roots": [str(adapters_folder())],
        "served-model-name": "from-the-file",
        "stream_interval": 6,
        "api_keys": list(GUARD_KEYS),
        "strict_requests": True,
        "engine": "inline",
        "max_model_len": 512,
        "log_level": "warning",
    }
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return file


@pytest.fixture
def wait_until() -> Callable[..., bool]:
    """``wait_until(condition, seconds)``: whether it comes true in time."""
    return eventually


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command to its end: ``run_command("adapters", "list", stdin="...")``."""

    def run(*arguments: str | Path, stdin: str = "", env: Mapping[str, str] = {}) -> Any:
        return subprocess.run(
            [COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=clean_environment(env),
            timeout=START_SECONDS,
            check=False,
        )

    return run


class AdapterFolder:
    """A copy of a demo adapter, to be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.path / CONFIG).read_text(encoding="utf-8")))

    def edit_config(self, **changes: Any) -> None:
        (self.path / CONFIG).write_text(json.dumps(self.config | changes), encoding="utf-8")

    def edit_tensors(self, edit: Callable[[dict[str, Any]], object]) -> None:
        tensors = load_file(self.weights)
        edit(tensors)
        save_file(tensors, self.weights)

    def become(self, other: str) -> None:
        """From now on another adapter of the demo, under the same path."""
        shutil.rmtree(self.path)
        shutil.copytree(adapters_folder() / other, self.path)


@pytest.fixture
def copy_adapter(tmp_path: Path) -> Callable[..., AdapterFolder]:
    """``copy_adapter("upper")``: a copy of a demo adapter that a test may change."""

    def copy(name: str, to: str = "copy") -> AdapterFolder:
        shutil.copytree(adapters_folder() / name, tmp_path / to)
        return AdapterFolder(tmp_path / to)

    return copy


@pytest.fixture
def load(demo: Server) -> Iterator[Callable[..., httpx2.Response]]:
    """Load an adapter into the demo as vLLM's clients do; what was loaded is unloaded after the test."""
    names: list[str] = []

    def post(name: str, path: str | Path, **fields: Any) -> httpx2.Response:
        names.append(name)
        return demo.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})

    yield post
    for name in names:
        with suppress(httpx2.HTTPError):
            demo.post("/v1/unload_lora_adapter", {"lora_name": name})
