"""Clients that go away: their requests end at once and give back their pages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

HI: Any = [{"role": "user", "content": "hi"}]
NUM_CHOICES = 16
MAX_TOKENS = 900
ENDLESS: Any = {
    "model": "upper",
    "messages": HI,
    "n": NUM_CHOICES,
    "max_tokens": MAX_TOKENS,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def cut_short(demo: Any, wait_until: Callable[..., bool]) -> Any:
    """Sees to it that what happens inside is aborted, long before it would have ended, and that no page is left."""

    @contextlib.contextmanager
    def check(count: int = 1) -> Iterator[None]:
        assert wait_until(demo.is_idle)
        before = demo.metrics()
        yield
        assert wait_until(lambda: aborted(demo.metrics()) - aborted(before) == count)
        assert wait_until(demo.is_idle)
        tokens = "loraplex_generation_tokens_total"
        assert demo.metrics().value(tokens) - before.value(tokens) < count * NUM_CHOICES * MAX_TOKENS / 2

    return check


def aborted(metrics: Any) -> float:
    counts = metrics.families["loraplex_requests"].samples
    return sum(one.value for one in counts if one.labels["outcome"] == "aborted" and one.name.endswith("_total"))


def test_closing_a_stream_early_frees_its_pages(demo: Any, cut_short: Any, wait_until: Callable[..., bool]) -> None:
    with cut_short(), demo.openai() as client:
        stream = client.chat.completions.create(**ENDLESS, stream=True)
        next(stream)
        assert wait_until(lambda: demo.metrics().value("loraplex_requests_running") == NUM_CHOICES)
        assert demo.metrics().value("loraplex_pool_pages", use="kv") > 0
        assert demo.metrics().value("loraplex_http_requests_in_flight") == 1
        stream.close()


async def test_closing_async_streams_early_frees_their_pages(demo: Any, cut_short: Any) -> None:
    async def begin_and_break(client: openai.AsyncOpenAI, adapter: str) -> None:
        stream = await client.chat.completions.create(**ENDLESS | {"model": adapter}, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()

    with cut_short(count=3):
        async with demo.async_openai() as client:
            await asyncio.gather(*(begin_and_break(client, name) for name in ("upper", "sort", "emoji")))


def test_a_client_that_waits_no_longer_frees_its_pages(demo: Any, cut_short: Any) -> None:
    with cut_short(), demo.openai(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**ENDLESS)


async def test_a_cancelled_task_frees_its_pages(demo: Any, cut_short: Any) -> None:
    with cut_short():
        async with demo.async_openai() as client:
            task = asyncio.create_task(client.chat.completions.create(**ENDLESS))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


def test_others_do_not_notice(demo: Any, cut_short: Any) -> None:
    with cut_short(), demo.openai() as client:
        stream = client.chat.completions.create(**ENDLESS, stream=True)
        next(stream)
        assert demo.ask("adapter", "reverse") == "retpada"
        stream.close()
        assert demo.ask("adapter", "reverse") == "retpada"
