"""How a server ends: it drains, in time or out of it. These tests end the servers that they use, so they come late."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

HI: Any = [{"role": "user", "content": "hi"}]


def long_stream(server: Any, max_tokens: int, n: int, model: str = "upper") -> tuple[Any, Any]:
    """A client and a stream of it that has begun."""
    client = server.openai()
    stream = client.chat.completions.create(
        model=model, messages=HI, stream=True, n=n, max_tokens=max_tokens, extra_body={"ignore_eos": True}
    )
    next(stream)
    return client, stream


def count_ends(stream: Any) -> int:
    return sum(choice.finish_reason is not None for chunk in stream for choice in chunk.choices)


def test_open_streams_finish_and_new_work_is_refused(demo: Any, wait_until: Callable[..., bool]) -> None:
    client, stream = long_stream(demo, max_tokens=60, n=4)
    with client, ThreadPoolExecutor(1) as pool:
        ends: Future[int] = pool.submit(count_ends, stream)
        demo.signal(signal.SIGTERM)
        assert wait_until(lambda: demo.get("/health").status_code == 503)
        refused = demo.post("/v1/chat/completions", {"model": "upper", "messages": HI})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
        assert "shutting down" in refused.json()["error"]["message"]
        assert demo.get("/livez").status_code == 200
        assert not ends.done()
        assert ends.result(timeout=30) == 4
    assert demo.wait() == 0


def test_streams_that_outlast_the_drain_end_with_an_error(small_pool: Any) -> None:
    client, stream = long_stream(small_pool, max_tokens=250, n=100)
    with client:
        small_pool.signal(signal.SIGTERM)
        started = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            count_ends(stream)
        assert 0.4 < time.monotonic() - started < 10
    assert small_pool.wait() == 0


def test_a_second_signal_ends_the_drain_at_once(guarded: Any, wait_until: Callable[..., bool]) -> None:
    client, stream = long_stream(guarded, max_tokens=500, n=100, model="shout")
    with client:
        guarded.signal(signal.SIGINT)
        assert wait_until(lambda: guarded.get("/health").status_code == 503)
        assert guarded.is_alive
        guarded.signal(signal.SIGTERM)
        started = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            count_ends(stream)
    assert guarded.wait() == 0
    assert time.monotonic() - started < 10


def test_an_engine_does_not_outlive_its_server(mortal: Any, wait_until: Callable[..., bool]) -> None:
    engine = psutil.Process(mortal.engine_pid)
    mortal.signal(signal.SIGKILL)
    assert mortal.wait() == -signal.SIGKILL
    assert wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
