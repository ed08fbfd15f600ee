"""A demo server under load, the real Prometheus scraping it, and then every query of the dashboards.

python tests/deploy/dashboard_check.py [--seconds 15]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import dashboard_load
import dashboard_queries
import httpx2

LORAPLEX = Path(sys.executable).with_name("loraplex")
GREETING = re.compile(r"^ +(http://\S+)  \(Ctrl-C", re.MULTILINE)
KEYS = {"acme": "key-of-acme", "globex": "key-of-globex"}
UNNAMED_KEY = "key-of-nobody"
START_SECONDS = 120
SETTLE_SECONDS = 2
"""Until the last answers have been scraped, and the rules have seen them."""

POOL_BYTES = 4_000_000
"""Room for a few of the demo's adapters, so that they push one another out."""


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> Iterator[Path]:
    """A process, with the file that its output goes to; it is ended, and killed if need be."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(found: Callable[[], str | None], log: Path) -> str:
    """What is found in time; RuntimeError with the log if nothing is."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.05)
    raise RuntimeError(log.read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """The demo with tenants, a small pool, and everything in its metrics. Yields its URL."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    environment["LORAPLEX_TENANT_KEYS"] = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    environment["LORAPLEX_API_KEYS"] = UNNAMED_KEY
    command = (LORAPLEX, "demo", "--port", "0", "--device", "cpu", "--expert-metrics", "3")
    limits = ("--pool-bytes", str(POOL_BYTES), "--max-model-len", "256", "--threads", "1")
    with running((*command, *limits), folder / "server.log", environment) as log:

        def url() -> str | None:
            greeting = GREETING.search(log.read_text(encoding="utf-8", errors="replace"))
            return greeting[1] if greeting else None

        yield wait_for(url, log)


@contextlib.contextmanager
def prometheus_server(binary: str, targets: Sequence[str], folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes the targets each second, and has the rules. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(dashboard_queries.RULES)],
        "scrape_configs": [
            {"job_name": "loraplex", "static_configs": [{"targets": list(targets), "labels": {"namespace": "prod"}}]}
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    url = f"http://127.0.0.1:{port}"
    flags = (
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with running((binary, *flags), folder / "prometheus.log") as log:

        def ready() -> str | None:
            with contextlib.suppress(httpx2.HTTPError):
                return url if httpx2.get(f"{url}/-/ready").status_code == 200 else None
            return None

        yield wait_for(ready, log)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Check the dashboards with a demo server and a Prometheus.")
    parser.add_argument("--seconds", type=int, default=15, help="how long the server is loaded")
    seconds = parser.parse_args().seconds
    binary = shutil.which("prometheus")
    if binary is None:
        print("prometheus is not installed")
        return 2
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-dashboards-")))
        server = stack.enter_context(demo_server(folder))
        prometheus = stack.enter_context(prometheus_server(binary, [server.removeprefix("http://")], folder))
        began = time.monotonic()
        statuses = dashboard_load.run(server, seconds, (*KEYS.values(), UNNAMED_KEY))
        time.sleep(SETTLE_SECONDS)
        passed = math.ceil(time.monotonic() - began)
        print(", ".join(f"{count} x {status or 'left'}" for status, count in sorted(statuses.items())))
        found = dashboard_queries.problems(prometheus, passed)
        for problem in found:
            print(problem)
        print(f"{len(list(dashboard_queries.targets()))} queries, {len(found)} problems")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
