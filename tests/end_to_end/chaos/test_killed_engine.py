"""The engine is killed with -9 under load, three times: what was in flight is lost, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

PINNED, ONE, OTHER = "spell-04", "reverse-04", "caesar-04"
LONG = {"ignore_eos": True, "max_tokens": 100}
LATEST = 60.0
"""Seconds after a kill until there are answers again at the latest, on a machine that has other things to do."""


def listed(server: Any) -> dict[str, dict[str, Any]]:
    """What the registry says of each adapter, wherever it is now."""
    changing = {"tier", "state", "running", "error"}
    data = server.get("/v1/adapters").json()["data"]
    return {one["id"]: {key: value for key, value in one.items() if key not in changing} for one in data}


@pytest.fixture
def pinned(chaos: Any) -> Any:
    assert chaos.post(f"/v1/adapters/{PINNED}/pin", {}).status_code == 200
    yield
    assert chaos.post(f"/v1/adapters/{PINNED}/unpin", {}).status_code == 200


def test_three_kills_under_load_lose_only_what_was_in_flight(
    load: Any,
    chaos: Any,
    adapters: Any,
    folders: Any,
    slowness: Any,
    pinned: Any,
    tmp_path: Path,
    wait_until: Callable[..., bool],
) -> None:
    slow = folders.copy_adapter("echo", tmp_path / "slow-cut", 60)
    names = ["upper-00", "upper-04", "reverse-00", "echo-00", "echo-04"]
    for name in (*names, ONE, OTHER):
        assert chaos.ask("kernel", name) == load.right_answer(name, "kernel")
    before = listed(chaos)
    restarts = chaos.metrics().value("loraplex_engine_restarts_total")
    with load.Load(chaos, [*names, None], clients=6, options=LONG) as running:
        for turn in range(3):
            running.wait_for_answers(3, seconds=LATEST)
            engine = chaos.engine_pid
            assert wait_until(lambda: chaos.metrics().value("loraplex_requests_running") >= 3)
            if turn == 0:
                kill_during_a_load(chaos, slowness, slow)
            else:
                os.kill(engine, signal.SIGKILL)
            if turn == 1:
                adapters.swap(ONE, OTHER)
            running.wait_for_answers(1, seconds=LATEST)
            assert chaos.engine_pid != engine
    check_lost(running, kills=3)
    assert chaos.post("/v1/adapters", {"id": "echo-cut", "path": str(slow)}).status_code == 200
    assert answers(load, chaos, "echo-cut")
    assert chaos.request("DELETE", "/v1/adapters/echo-cut").status_code == 200
    assert chaos.metrics().value("loraplex_engine_restarts_total") == restarts + 3

    assert listed(chaos) == before
    assert wait_until(lambda: chaos.get(f"/v1/adapters/{PINNED}").json()["tier"] == "pool")
    for name in (ONE, OTHER):
        with httpx2.Client(base_url=chaos.url, timeout=60) as client:
            refused = load.ask(client, name, "kernel").failure
        assert refused is not None
        assert "changed" in refused.message
        assert f"'{name}'" in refused.message
    adapters.mend(ONE, OTHER)
    for name in (ONE, OTHER, *names):
        assert wait_until(lambda name=name: answers(load, chaos, name), 60)
    assert wait_until(chaos.is_idle)


def kill_during_a_load(server: Any, slowness: Any, folder: Path) -> None:
    """Kill the engine while it reads an adapter for a client: who is told so, and nothing is registered."""
    slowness.begin(100)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/v1/adapters", {"id": "echo-cut", "path": str(folder)})
            time.sleep(0.5)  # nothing tells that a read has begun
            assert not waiting.done(), waiting.result().text
            os.kill(server.engine_pid, signal.SIGKILL)
            refused = waiting.result(LATEST)
    finally:
        slowness.end()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert server.get("/v1/adapters/echo-cut").status_code == 404


def answers(load: Any, server: Any, name: str) -> bool:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        return bool(load.ask(client, name, "kernel").is_right)


def check_lost(running: Any, kills: int) -> None:
    """Each failure says what happened, and in the body tells when to come again; streams that had begun end with it."""
    failures = [one.failure for one in running.failures]
    assert len(failures) >= kills
    for failure in failures:
        assert (failure.code, failure.type) == ("unavailable", "overloaded_error")
        assert "engine process died (signal 9)" in failure.message or "engine is not ready" in failure.message
        assert failure.status in {None, 503}
        assert failure.status is None or failure.retry_after == "1"
    assert any(failure.status is None for failure in failures), "no stream was under way"
