from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient


@pytest.mark.parametrize("state", ["starting", "restarting", "failed", "stopped"])
def test_health_fails_with_the_reason_while_there_is_no_engine(client: TestClient, engine: Any, state: str) -> None:
    engine.state = state
    for path in ("/health", "/readyz", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, state in answer.json()["error"]["message"]) == (503, True)
    assert client.get("/livez").status_code == 200
    assert client.get("/metrics").status_code == 200


def test_health_is_ok_once_the_engine_is_ready(client: TestClient) -> None:
    for path in ("/health", "/livez", "/readyz", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_the_version_is_that_of_the_package(client: TestClient) -> None:
    assert client.get("/version").json()["version"].count(".") == 2


def test_the_openapi_page_describes_the_bodies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "adapter_id", "temperature"} <= set(body["properties"])
    assert "$ref" not in str(body)
