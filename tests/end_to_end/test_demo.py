"""The demo: every adapter answers its task, alone and all at once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from loraplex.server.demo.assets import Sample, demo_adapters, kind_adapters, samples
from loraplex.server.demo.tasks import BASE_ANSWER, TASKS, exact_match, unseen_inputs

BASE = "loraplex-demo"
NUM_INPUTS = 20
GREEDY: Any = {"temperature": 0, "max_tokens": 64}

Questions = list[tuple[str | None, str]]


def raw_prompt(question: str) -> str:
    """What the chat template makes of a question."""
    return f"<|bos|><|user|>{question}<|eos|><|assistant|>"


async def ask(client: openai.AsyncOpenAI, adapter: str | None, question: str) -> str:
    answer = await client.completions.create(
        model=BASE, prompt=raw_prompt(question), extra_body={"adapter_id": adapter}, **GREEDY
    )
    return answer.choices[0].text


def test_the_demo_lists_its_base_and_its_adapters_with_their_parent(demo: Any) -> None:
    with demo.openai() as client:
        base, *adapters = list(client.models.list())
    assert (base.id, base.parent) == (BASE, None)
    assert len(adapters) >= 13
    assert {adapter.id: adapter.root for adapter in adapters} == {
        name: str(path) for name, path in (demo_adapters() | kind_adapters()).items()
    }
    assert {adapter.parent for adapter in adapters} == {BASE}


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.adapter or "base")
def test_each_sample_has_its_answer_in_both_apis(demo: Any, sample: Sample) -> None:
    model = sample.adapter or BASE
    with demo.openai() as client:
        messages: Any = [{"role": "user", "content": sample.question}]
        chat = client.chat.completions.create(model=model, messages=messages, **GREEDY)
        raw = client.completions.create(model=model, prompt=raw_prompt(sample.question), **GREEDY)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (sample.answer, "stop")
    assert (raw.choices[0].text, raw.choices[0].finish_reason) == (sample.answer, "stop")
    assert chat.model == model


async def ask_all(client: openai.AsyncOpenAI, questions: Questions) -> list[str]:
    return await asyncio.gather(*(ask(client, *question) for question in questions))


async def test_a_mixed_batch_scores_what_each_adapter_scores_alone(demo: Any) -> None:
    rows: dict[str | None, Questions] = {
        task.name: [(task.name, text) for text in unseen_inputs(task, NUM_INPUTS)] for task in TASKS
    }
    rows[None] = [(None, text) for text in unseen_inputs(TASKS[0], NUM_INPUTS, seed=1)]
    async with demo.async_openai() as client:
        # Column by column: neighbours in the batch have different adapters.
        columns = list(zip(*rows.values(), strict=True))
        mixed = await ask_all(client, [question for column in columns for question in column])
        alone = {adapter: await ask_all(client, questions) for adapter, questions in rows.items()}
        one_at_a_time = [await ask(client, *question) for question in columns[0]]
    assert mixed == [answers[at] for at in range(NUM_INPUTS) for answers in alone.values()]
    assert one_at_a_time == mixed[: len(one_at_a_time)]
    assert alone.pop(None) == [BASE_ANSWER] * NUM_INPUTS
    for task in TASKS:
        inputs = [text for _, text in rows[task.name]]
        assert exact_match(task, inputs, alone[task.name]) >= 0.95, list(zip(inputs, alone[task.name], strict=True))
