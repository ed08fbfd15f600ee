"""More adapters than the pool and the host store can hold: they come and go, and every answer is right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from loraplex.server.demo.tasks import TASKS, unseen_inputs

NUM_REQUESTS = 60


async def test_sixty_requests_over_all_adapters_are_answered_right(
    small_pool: Any, wait_until: Callable[..., bool]
) -> None:
    async def ask(client: Any, name: str, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        answer = await client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=48)
        return str(answer.choices[0].message.content)

    per_task = NUM_REQUESTS // len(TASKS)
    # Round by round, so that neighbours in the queue want different adapters.
    questions = [task for _ in range(per_task) for task in TASKS]
    texts = [unseen_inputs(task, per_task, seed=2)[at // len(TASKS)] for at, task in enumerate(questions)]
    async with small_pool.async_openai() as client:
        answers = await asyncio.gather(
            *(ask(client, task.name, text) for task, text in zip(questions, texts, strict=True))
        )
        alone = [await ask(client, task.name, text) for task, text in zip(questions[:10], texts[:10], strict=True)]
    assert answers[:10] == alone
    right = [task.answer(text) == answer for task, text, answer in zip(questions, texts, answers, strict=True)]
    assert sum(right) >= 0.95 * NUM_REQUESTS

    assert wait_until(small_pool.is_idle)
    metrics = small_pool.metrics()
    assert metrics.value("loraplex_adapter_evictions_total", tier="pool") > 0
    assert metrics.value("loraplex_adapter_loads_total") > len(TASKS)
    assert metrics.value("loraplex_tier_adapters", tier="pool") < len(TASKS)
    assert metrics.value("loraplex_tier_bytes", tier="host") <= metrics.value("loraplex_tier_limit_bytes", tier="host")
    uses = ("kv", "cached", "adapter", "free")
    pages = {use: metrics.value("loraplex_pool_pages", use=use) for use in uses}
    assert pages["kv"] == 0
    assert sum(pages.values()) == metrics.value("loraplex_pool_capacity_pages")


def test_what_can_never_fit_is_refused_with_the_numbers(small_pool: Any) -> None:
    body = {"model": "loraplex-demo", "prompt": "a" * 257, "max_tokens": 1}
    answer = small_pool.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "256" in answer.json()["error"]["message"]
