from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.messages import AdapterRef
from loraplex.server.registry_file import RegistryFile

CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture
def client(make_client: Callable[..., TestClient], state: RegistryFile) -> Iterator[TestClient]:
    with make_client(state=state, max_uploads=2) as client:
        yield client


def upload(client: TestClient, name: str) -> Any:
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": name.encode() * 1000}
    return client.post("/v1/adapters", data={"id": name}, files=files)


def test_one_upload_too_many_is_told_to_come_back(client: TestClient, engine: Any, state: RegistryFile) -> None:
    arrived, load, go_on = threading.Semaphore(0), engine.load_adapter, threading.Event()

    async def slow_load(ref: AdapterRef) -> Any:
        arrived.release()
        assert await asyncio.to_thread(go_on.wait, 20)
        return await load(ref)

    engine.load_adapter = slow_load
    with ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(upload, client, name) for name in ("one", "two")]
        assert all(arrived.acquire(timeout=20) for _ in under_way)
        refused = upload(client, "three")
        go_on.set()
        assert [answer.result().status_code for answer in under_way] == [200, 200]
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["code"], error["message"]) == (
        "overloaded",
        "2 uploads are under way, and the limit is 2 ('max_uploads').",
    )
    assert "retry-after" in refused.headers
    assert list(state.staging.iterdir()) == []
    assert upload(client, "three").status_code == 200, "their places are free again"


def test_uploads_that_fail_give_their_place_back(client: TestClient) -> None:
    for _ in range(5):
        assert client.post("/v1/adapters", data={"id": "mine"}, files={"other.txt": b"x"}).status_code == 400
    assert upload(client, "mine").status_code == 200
