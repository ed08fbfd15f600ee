"""A real Prometheus scrapes a container under load. This comes before test_serving.py, which ends the containers."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
RULES = DEPLOY / "helm" / "loraplex" / "files" / "rules"
LOAD_SECONDS = 20


@pytest.fixture(scope="module")
def prometheus(
    from_manifests: Any, require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a Prometheus with the configuration of deploy/prometheus, but for where the server and the rules are."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [f"{RULES}/*.yaml"]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{from_manifests.port}"], "labels": {"namespace": "default"}}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log.txt").open("wb") as log:
        url = f"http://127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [
                require_tool("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={url.removeprefix('http://')}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{url}/-/ready"):
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    with suppress(httpx2.HTTPError):
        return httpx2.get(url, timeout=5).status_code == 200
    return False


@contextmanager
def asked_on_and_on(server: Any, model: str) -> Iterator[None]:
    """One more client, whose only model is a mixture: on a slow machine the load may not come round to it twice."""
    over = threading.Event()

    def ask() -> None:
        with server.openai() as client:
            while not over.wait(0.5):
                client.completions.create(model=model, prompt="kernel", max_tokens=8)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        asking.result()


def asked(url: str, path: str, **parameters: str) -> Any:
    answer = httpx2.get(f"{url}/api/v1/{path}", params=parameters, timeout=30).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def test_every_query_of_the_dashboards_is_answered_under_load(
    prometheus: str, from_manifests: Any, run_script: Callable[..., str], report: Callable[[str], None]
) -> None:
    seconds = ("--seconds", str(LOAD_SECONDS))
    with asked_on_and_on(from_manifests, "words-mixlora"):
        load = run_script("dashboard_load.py", from_manifests.url, *seconds, "--keys", *from_manifests.keys)
    report(f"load: {load.strip()}")
    report(f"dashboards: {run_script('dashboard_queries.py', prometheus, *seconds).strip()}")


def test_the_server_is_up_to_prometheus_and_the_rules_are_evaluated(prometheus: str) -> None:
    (up,) = asked(prometheus, "query", query="up")["result"]
    assert up["value"][1] == "1"
    groups = asked(prometheus, "rules")["groups"]
    assert {Path(group["file"]).name for group in groups} == {path.name for path in RULES.glob("*.yaml")}
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert not [json.dumps(rule) for rule in rules if rule["health"] == "err"]


def test_a_scrape_is_text_that_promtool_accepts(from_manifests: Any, require_tool: Callable[[str], str]) -> None:
    text = httpx2.get(f"{from_manifests.url}/metrics", timeout=10).text
    checked = subprocess.run(
        [require_tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
