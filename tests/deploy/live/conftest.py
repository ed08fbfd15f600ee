"""An image that was built, and containers of it: from flags, and from the manifests that the chart renders.

`make deploy-test` (run.sh beside this file) builds the image and names it in LORAPLEX_LIVE_IMAGE. Without that variable
nothing here is collected.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml

IMAGE = os.environ.get("LORAPLEX_LIVE_IMAGE", "")
collect_ignore_glob = [] if IMAGE else ["test_*.py"]

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy" / "helm" / "loraplex"
USER = 10001
START_SECONDS = 240

# Keys of two tenants and of nobody's, and a pool so small that adapters push one another out: dashboards have something
# to show. One thread: two are several times slower than one where other processes want the cores.
TENANT_KEYS = {"acme": "key-of-acme", "globex": "key-of-globex"}
API_KEY = "key-of-nobody"
SETTINGS = {"pool_bytes": 1_500_000, "max_model_len": 256, "expert_metrics": 20, "threads": 1}


def podman(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman; its error is the failure's text."""
    done = subprocess.run(["podman", *map(str, arguments)], capture_output=True, text=True, timeout=240)
    if check and done.returncode != 0:
        pytest.fail(f"podman {' '.join(map(str, arguments))}: {done.stderr}")
    return done


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Container:
    """A running container of the image, on the machine's own network, and how to speak to it."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.port = name, port
        self.url = f"http://127.0.0.1:{port}"
        self.keys = (*TENANT_KEYS.values(), API_KEY)
        self.start_seconds, self.pid = 0.0, 0

    def wait_until_ready(self) -> None:
        """Return when /readyz is 200; fail with the log if the container ends or takes too long."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    self.start_seconds = time.monotonic() - started
                    self.pid = int(self.inspect()["State"]["Pid"])
                    return
            if not self.inspect()["State"]["Running"]:
                pytest.fail(f"{self.name} has ended:\n{self.log()}")
            time.sleep(0.25)
        pytest.fail(f"{self.name} is not ready after {START_SECONDS} s:\n{self.log()}")

    def inspect(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(podman("container", "inspect", self.name).stdout)
        return found[0]

    def log(self) -> str:
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def python(self, code: str) -> str:
        """What a program prints that runs in the container beside the server, as the same user."""
        return podman("exec", self.name, "python", "-I", "-c", code).stdout

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, timeout=60, max_retries=0)

    def signal(self, name: str) -> None:
        """Send a signal to the first process, at once."""
        os.kill(self.pid, signal.Signals[name])

    def wait(self, seconds: float = 90) -> int:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.inspect()["State"]
            if not state["Running"]:
                return int(state["ExitCode"])
            time.sleep(0.1)
        pytest.fail(f"{self.name} has not ended after {seconds} s:\n{self.log()}")


@pytest.fixture(scope="session")
def image() -> dict[str, Any]:
    """What podman knows of the image."""
    found: list[dict[str, Any]] = json.loads(podman("image", "inspect", IMAGE).stdout)
    return found[0]


@pytest.fixture(scope="session")
def in_image() -> Callable[[str], str]:
    """Run a Python program in the image, as its user, on a read-only root; what it prints."""

    def run(code: str) -> str:
        return podman(
            *("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "all", "--entrypoint", "python"),
            *(IMAGE, "-I", "-c", code),
        ).stdout

    return run


def volume(folder: Path, name: str) -> Path:
    """A folder that the server may write to."""
    path = folder / name
    path.mkdir()
    shutil.chown(path, USER, USER)
    return path


@pytest.fixture(scope="session")
def from_flags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The image as docs/containers.md runs it by hand, with settings in the environment."""
    folder = tmp_path_factory.mktemp("volumes")
    container = Container("loraplex-from-flags", free_port())
    settings = SETTINGS | {"port": container.port, "api_keys": API_KEY, "tenant_keys": ",".join(tenant_keys())}
    podman(
        *("run", "--detach", "--name", container.name, "--network", "host"),
        *("--user", f"{USER}:{USER}", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777", "--shm-size", "256m"),
        *("--volume", f"{volume(folder, 'state')}:/var/lib/loraplex"),
        *("--volume", f"{volume(folder, 'cache')}:/var/cache/loraplex"),
        *(word for key, value in settings.items() for word in ("--env", f"LORAPLEX_{key.upper()}={value}")),
        IMAGE,
    )
    container.wait_until_ready()
    yield container
    podman("rm", "--force", "--time", "1", container.name, check=False)


def tenant_keys() -> list[str]:
    return [f"{tenant}:{key}" for tenant, key in TENANT_KEYS.items()]


def demo_values(port: int) -> dict[str, Any]:
    """The chart's example of the demo on a CPU, with this image and the settings of the other container."""
    values: dict[str, Any] = yaml.safe_load((CHART / "examples" / "cpu-demo.yaml").read_text())
    repository, _, tag = IMAGE.rpartition(":")
    keys = {"LORAPLEX_API_KEYS": API_KEY, "LORAPLEX_TENANT_KEYS": ",".join(tenant_keys())}
    return values | {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "containerPort": port,
        "config": values.get("config", {}) | SETTINGS,
        "env": [{"name": name, "value": value} for name, value in keys.items()],
    }


def for_podman(objects: list[dict[str, Any]]) -> str:
    """Those of the manifests that podman plays, but for what it cannot do or would hide.

    Containers are on the machine's network, since not every machine lets podman make one, so there are no ports to map;
    podman 4 runs no HTTP probes; and a container that ends is not started again, so that its end can be seen.
    """
    played = sorted(
        (found for found in objects if found["kind"] in ("ConfigMap", "Deployment")), key=lambda o: o["kind"]
    )
    for pod in (found["spec"]["template"]["spec"] for found in played if found["kind"] == "Deployment"):
        pod |= {"hostNetwork": True, "restartPolicy": "Never"}
        for container in pod["containers"]:
            for name in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
                container.pop(name, None)
    return yaml.safe_dump_all(played)


@pytest.fixture(scope="session")
def from_manifests(render: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The pod that the chart renders for the demo on a CPU."""
    port = free_port()
    file = tmp_path_factory.mktemp("manifests") / "demo.yaml"
    file.write_text(for_podman(render(demo_values(port)).objects))
    podman("play", "kube", "--network", "host", file)
    names = podman("ps", "--all", "--format", "{{.Names}}").stdout.split()
    container = Container(next(name for name in names if name.endswith("-loraplex")), port)
    container.wait_until_ready()
    yield container
    podman("play", "kube", "--down", file, check=False)


@pytest.fixture(params=["from_flags", "from_manifests"])
def server(request: pytest.FixtureRequest) -> Container:
    """Each kind of container."""
    found: Container = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def run_script() -> Callable[..., str]:
    """Run a script of tests/deploy with this Python; what it prints. It fails with that if the script does."""

    def run(name: str, *arguments: str) -> str:
        script = ROOT / "tests" / "deploy" / name
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def report() -> Iterator[Callable[[str], None]]:
    """Lines to print when all is done: sizes and times."""
    lines: list[str] = []
    yield lines.append
    sys.__stdout__.write("".join(f"\n   {line}" for line in lines) + "\n")
