"""The engine process is killed under load: its requests end with an error, and the server serves again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

HI: Any = [{"role": "user", "content": "hi"}]
LONG: Any = {"messages": HI, "n": 8, "max_tokens": 900, "extra_body": {"ignore_eos": True}}


class Watch:
    """The statuses of ``/health``, each when it changes."""

    def __init__(self, server: Any) -> None:
        self.statuses: list[int] = []
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            status = self._server.get("/health").status_code
            if self.statuses[-1:] != [status]:
                self.statuses.append(status)
            time.sleep(0.02)


def stream_to_its_error(server: Any, model: str) -> openai.APIError:
    with server.openai() as client:
        stream = client.chat.completions.create(model=model, stream=True, **LONG)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
    return caught.value


def wait_for_its_error(server: Any, model: str) -> openai.APIError:
    with server.openai() as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=model, **LONG)
    return caught.value


def test_a_killed_engine_is_started_again_and_nothing_is_lost(
    mortal: Any, copy_adapter: Any, wait_until: Callable[..., bool]
) -> None:
    folder = copy_adapter("reverse").path
    loaded = mortal.post("/v1/load_lora_adapter", {"lora_name": "backwards", "lora_path": str(folder)})
    assert loaded.status_code == 200
    assert mortal.ask("adapter", "backwards") == "retpada"
    killed = mortal.engine_pid
    with Watch(mortal) as watch, ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream_to_its_error, mortal, name) for name in ("upper", "backwards", "loraplex-demo")]
        bodies = [pool.submit(wait_for_its_error, mortal, name) for name in ("upper", "sort")]
        assert wait_until(lambda: mortal.metrics().value("loraplex_requests_running") >= 40)
        os.kill(killed, signal.SIGKILL)
        errors = [future.result(timeout=30) for future in streams + bodies]
        assert wait_until(lambda: mortal.get("/health").status_code == 503)
        refused = mortal.post("/v1/chat/completions", {"model": "upper", "messages": HI})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert mortal.get("/livez").status_code == 200
        assert mortal.get("/v1/adapters/backwards").json()["tier"] == "disk"
        assert wait_until(lambda: mortal.get("/health").status_code == 200, 60)
        time.sleep(0.1)
    assert watch.statuses == [200, 503, 200]
    assert all("engine process died (signal 9)" in error.message for error in errors)
    assert {error.status_code for error in errors[3:]} == {503}

    assert mortal.engine_pid != killed
    assert mortal.ask("adapter", "backwards") == "retpada"
    assert mortal.ask("loraplex", "upper") == "LORAPLEX"
    metrics = mortal.metrics()
    assert metrics.value("loraplex_engine_restarts_total") == 1
    assert metrics.value("loraplex_requests_total", outcome="failed") >= len(errors)
    assert wait_until(mortal.is_idle)


def test_the_log_is_one_object_of_json_a_line(mortal: Any) -> None:
    lines = [line for line in mortal.log.splitlines() if line.startswith("{")]
    assert {"event", "level", "timestamp"} <= json.loads(lines[0]).keys()
