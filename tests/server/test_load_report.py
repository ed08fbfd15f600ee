from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.messages import EngineStats

FORMAT, REPORT = "endpoint-load-metrics-format", "endpoint-load-metrics"
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
COMPLETION = ("/v1/completions", {"prompt": "hi", "max_tokens": 2})


@pytest.fixture(autouse=True)
def loaded(engine: Any) -> None:
    engine.stats = EngineStats(pages_total=64, pages_held=16, waiting=3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
def test_an_answer_tells_the_load_in_the_format_that_was_asked_for(
    client: TestClient, path: str, body: dict[str, Any], stream: bool
) -> None:
    def report(wanted: str) -> str:
        answer = client.post(path, json=body | {"stream": stream}, headers={FORMAT: wanted})
        assert answer.status_code == 200
        return answer.headers[REPORT]

    expected = "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
    assert report("text") == report("TEXT") == expected
    kind, _, rest = report("json").partition(" ")
    assert kind == "JSON"
    assert json.loads(rest) == {"named_metrics": {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}}


def test_nothing_is_told_unasked_or_in_an_unknown_format_or_with_an_error(client: TestClient) -> None:
    path, body = COMPLETION
    assert REPORT not in client.post(path, json=body).headers
    assert REPORT not in client.post(path, json=body, headers={FORMAT: "BIN"}).headers
    assert REPORT not in client.post(path, json={}, headers={FORMAT: "text"}).headers
    assert REPORT not in client.get("/v1/models", headers={FORMAT: "text"}).headers


def test_before_the_first_snapshot_the_server_is_empty(client: TestClient, engine: Any) -> None:
    engine.stats = EngineStats()
    path, body = COMPLETION
    assert "kv_cache_usage_perc=0.0" in client.post(path, json=body, headers={FORMAT: "text"}).headers[REPORT]
