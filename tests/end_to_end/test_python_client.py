"""``loraplex.clients`` against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from loraplex.clients.client import Client
from loraplex.clients.errors import (
    AdapterNotFound,
    AuthenticationFailed,
    BadRequest,
    Conflict,
    ConnectionFailed,
    TimedOut,
)

SPELL = "<|bos|><|user|>kernel<|eos|><|assistant|>"
KERNEL = [{"role": "user", "content": "kernel"}]
ANSWER = "k-e-r-n-e-l"
ENDLESS: Any = {"n": 16, "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def client(demo: Any) -> Any:
    with demo.client() as client:
        yield client


def test_it_generates_and_chats(client: Client) -> None:
    answer = client.generate(SPELL, adapter_id="spell", temperature=0, logprobs=1)
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ANSWER) + 1
    assert answer.logprobs is not None
    assert client.chat(KERNEL, adapter_id="spell", temperature=0).text == ANSWER
    assert client.chat(KERNEL, temperature=0).text == "I am the base model. Name an adapter."
    many = client.chat(KERNEL, adapter_id="spell", temperature=0, n=3)
    assert [choice.text for choice in many.choices] == [ANSWER] * 3


def test_it_streams(client: Client) -> None:
    for stream in (
        client.stream(SPELL, adapter_id="spell", temperature=0),
        client.stream_chat(KERNEL, adapter_id="spell", temperature=0),
    ):
        with stream:
            *events, last = stream
        assert "".join(event.text for event in events) == ANSWER
        assert last.usage is not None
        assert last.usage.completion_tokens == len(ANSWER) + 1


async def test_the_async_client_does_the_same(demo: Any) -> None:
    async with demo.async_client() as client:
        whole, chatted = await asyncio.gather(
            client.generate(SPELL, adapter_id="spell", temperature=0),
            client.chat(KERNEL, adapter_id="spell", temperature=0),
        )
        async with client.stream_chat(KERNEL, adapter_id="spell", temperature=0) as stream:
            streamed = "".join([event.text async for event in stream])
        assert whole.text == chatted.text == streamed == ANSWER
        assert "spell" in [adapter.name async for adapter in client.list_adapters()]
        with pytest.raises(AdapterNotFound):
            await client.chat(KERNEL, adapter_id="nobody")


def test_it_loads_lists_and_unloads_adapters(client: Client, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    adapter = client.load_adapter("theirs", folder.path)
    try:
        assert (adapter.name, adapter.path, adapter.kind) == ("theirs", str(folder.path), "lora")
        assert adapter.rank is not None
        assert client.chat(KERNEL, adapter_id="theirs", temperature=0).text == "lenrek"
        assert client.get_adapter("theirs").tier == "pool"
        assert "theirs" in [one.name for one in client.list_adapters()]
        assert "theirs" in [model.id for model in client.models()]
        with pytest.raises(Conflict):
            client.load_adapter("theirs", copy_adapter("spell", "other").path)
        replaced = client.load_adapter("theirs", folder.path.parent / "other", replace=True)
        assert replaced.identity != adapter.identity
        assert client.chat(KERNEL, adapter_id="theirs", temperature=0).text == ANSWER
    finally:
        client.unload_adapter("theirs")
    with pytest.raises(AdapterNotFound):
        client.get_adapter("theirs")


def test_its_errors_have_types(demo: Any, guarded: Any, client: Client) -> None:
    with pytest.raises(AdapterNotFound) as unknown:
        client.generate("a", adapter_id="nobody")
    assert (unknown.value.status, unknown.value.param) == (404, "adapter_id")
    assert unknown.value.request_id
    with pytest.raises(BadRequest) as long:
        client.generate("a" * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequest) as missing:
        client.load_adapter("none", "/no/such/folder")
    assert missing.value.param == "path"
    with demo.client(timeout=0.2) as hasty, pytest.raises(TimedOut):
        hasty.generate("a", **ENDLESS)
    with guarded.client(api_key="wrong") as stranger, pytest.raises(AuthenticationFailed):
        stranger.models()
    with Client("http://127.0.0.1:9", max_retries=0) as lost, pytest.raises(ConnectionFailed):
        lost.models()


def test_leaving_a_stream_frees_its_pages(demo: Any, client: Client, wait_until: Callable[..., bool]) -> None:
    with client.stream(SPELL, adapter_id="spell", **ENDLESS) as stream:
        next(stream)
        assert not demo.is_idle()
    assert wait_until(demo.is_idle, 5)


def test_it_tells_health_and_version(client: Client) -> None:
    assert client.health()
    assert client.version() == "0.1.0"
