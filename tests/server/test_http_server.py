from __future__ import annotations

import asyncio
import http.client
import json
import signal
import threading
import time
from typing import Any

import httpx2
import pytest


def finish(server: Any) -> None:
    server.thread.join(timeout=10)
    assert not server.thread.is_alive()


def stream_lines(server: Any, lines: list[str], started: threading.Event) -> None:
    body = {"prompt": "a", "max_tokens": 40, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            started.set()


def start_stream(server: Any) -> tuple[threading.Thread, list[str]]:
    lines: list[str] = []
    started = threading.Event()
    thread = threading.Thread(target=stream_lines, args=(server, lines, started))
    thread.start()
    assert started.wait(10)
    return thread, lines


def test_a_draining_server_finishes_open_streams_and_refuses_new_work(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.02
    server = serve()
    thread, lines = start_stream(server)
    server.server.handle_exit(signal.SIGTERM, None)
    refused = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert httpx2.get(f"{server.url}/health").status_code == 503
    assert httpx2.get(f"{server.url}/readyz").status_code == 503
    assert httpx2.get(f"{server.url}/livez").status_code == 200
    assert "loraplex_draining 1.0" in httpx2.get(f"{server.url}/metrics").text
    thread.join(timeout=10)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    finish(server)
    assert engine.aborted == []


def test_a_lingering_server_takes_new_work_on_connections_that_it_closes(serve: Any, engine: Any) -> None:
    server = serve(linger_seconds=2.0)
    with httpx2.Client(base_url=server.url) as client:
        assert "connection" not in client.post("/v1/completions", json={"prompt": "a"}).headers
        began = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        assert client.get("/readyz").status_code == 503
        taken = client.post("/v1/completions", json={"prompt": "a"})
        assert (taken.status_code, taken.headers["connection"]) == (200, "close")
    finish(server)
    assert 1.9 < time.monotonic() - began < 5


def test_a_second_signal_ends_the_lingering(serve: Any) -> None:
    server = serve(linger_seconds=60.0)
    server.server.handle_exit(signal.SIGTERM, None)
    server.server.handle_exit(signal.SIGTERM, None)
    finish(server)


def test_work_that_came_while_lingering_is_finished_in_the_drain(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.02
    server = serve(linger_seconds=0.5)
    server.server.handle_exit(signal.SIGTERM, None)
    thread, lines = start_stream(server)
    thread.join(timeout=10)
    finish(server)
    assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_kept_connection_is_closed_after_the_answer_that_a_drain_finds_under_way(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.02
    server = serve()
    host = server.url.removeprefix("http://")
    kept = http.client.HTTPConnection(host, timeout=10)
    body = json.dumps({"prompt": "a", "max_tokens": 20, "stream": True})
    kept.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = kept.getresponse()  # its head has been sent: it cannot say that the connection will close
    assert answer.headers["connection"] is None
    longer, _ = start_stream(server)  # keeps the server up beyond that answer
    server.server.handle_exit(signal.SIGTERM, None)
    assert answer.read().endswith(b"data: [DONE]\n\n")
    assert kept.sock is not None
    assert kept.sock.recv(1) == b""
    kept.close()
    assert longer.is_alive()
    longer.join(timeout=10)
    finish(server)


def test_an_idle_server_stops_at_once(serve: Any) -> None:
    server = serve()
    began = time.monotonic()
    server.server.handle_exit(signal.SIGTERM, None)
    finish(server)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("second_signal", [False, True])
def test_what_is_open_at_the_end_of_the_drain_is_ended_with_an_error(
    serve: Any, engine: Any, second_signal: bool
) -> None:
    engine.script.delay = 0.5
    server = serve(drain_seconds=60.0 if second_signal else 0.3)
    thread, lines = start_stream(server)
    server.server.handle_exit(signal.SIGTERM, None)
    if second_signal:
        server.server.handle_exit(signal.SIGTERM, None)
    finish(server)
    thread.join(timeout=10)
    last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert len(engine.aborted) == 1


def test_an_answer_without_a_stream_is_ended_with_503_at_the_end_of_the_drain(serve: Any, engine: Any) -> None:
    engine.script.first_delay = 30
    server = serve(drain_seconds=0.3)
    answers: list[Any] = []
    url = f"{server.url}/v1/completions"
    thread = threading.Thread(target=lambda: answers.append(httpx2.post(url, json={"prompt": "a"}, timeout=20)))
    thread.start()
    while not engine.commands:
        time.sleep(0.01)
    server.server.handle_exit(signal.SIGTERM, None)
    finish(server)
    thread.join(timeout=10)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "unavailable")


async def test_a_request_that_is_tracked_is_no_longer_in_flight_when_it_is_over(make_app: Any) -> None:
    lifecycle = make_app().state.edge.lifecycle
    with lifecycle.track():
        assert lifecycle.in_flight == 1
        await asyncio.sleep(0)
    assert lifecycle.in_flight == 0
