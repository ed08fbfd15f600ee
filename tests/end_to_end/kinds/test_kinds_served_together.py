"""Adapters of all kinds in one batch: right answers, and the numbers of the plain programs."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import openai
import pytest

from loraplex.server.demo.kinds import KINDS, KindAdapter, covered
from loraplex.server.demo.scoring import raw_prompt
from loraplex.server.demo.tasks import BASE_ANSWER, TASKS, Task, exact_match, unseen_inputs

NUM_INPUTS = 10
NUM_PLAIN_INPUTS = 2

Question = tuple[str | None, list[dict[str, str]]]


async def ask(client: openai.AsyncOpenAI, question: Question) -> str | None:
    adapter, messages = question
    answer = await client.chat.completions.create(
        model="loraplex-demo",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=64,
        extra_body={"adapter_id": adapter},
    )
    return answer.choices[0].message.content


def asked(adapter: KindAdapter, task: Task, inputs: list[str]) -> list[Question]:
    return [(adapter.name, adapter.messages(task, text)) for text in inputs]


async def test_one_batch_of_all_kinds_answers_right_and_as_each_does_alone(demo: Any) -> None:
    """Mixtures, DoRA, plain LoRA and base-only rows arrive at once, neighbours of different kinds."""
    exams = [(adapter, task, unseen_inputs(task, NUM_INPUTS)) for adapter in KINDS for task in covered(adapter)]
    rows = [asked(*exam) for exam in exams]
    plain: list[list[Question]] = [
        [(task.name, [{"role": "user", "content": text}]) for text in unseen_inputs(task, NUM_PLAIN_INPUTS)]
        for task in TASKS
    ]
    bare: list[list[Question]] = [[(None, messages) for _, messages in rows[0][:NUM_PLAIN_INPUTS]]]
    questions = [
        (lane, question)
        for column in itertools.zip_longest(*rows, *plain, *bare)
        for lane, question in enumerate(column)
        if question is not None
    ]
    async with demo.async_openai() as client:
        mixed = await asyncio.gather(*(ask(client, question) for _, question in questions))
        alone = [await ask(client, row[0]) for row in (*rows, *bare)]
    answers: list[list[Any]] = [[] for _ in (*rows, *plain, *bare)]
    for (lane, _), answer in zip(questions, mixed, strict=True):
        answers[lane].append(answer)
    scores = {
        (adapter.name, task.name): exact_match(task, inputs, found)
        for (adapter, task, inputs), found in zip(exams, answers, strict=False)
    }
    assert min(scores.values()) >= 0.9, scores
    for task, found in zip(TASKS, answers[len(rows) :], strict=False):
        assert exact_match(task, unseen_inputs(task, NUM_PLAIN_INPUTS), found) == 1, (task.name, found)
    assert answers[-1] == [BASE_ANSWER] * NUM_PLAIN_INPUTS
    assert alone == [found[0] for found in (*answers[: len(rows)], answers[-1])]


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.name)
def test_log_probabilities_are_those_of_the_plain_program(
    served_top: Any, reference: Any, top_of: Any, encode: Any, assert_near: Any, adapter: KindAdapter
) -> None:
    """Of prompts with their right answers, and of a text that the adapter never saw the like of."""
    texts = [
        raw_prompt(question, adapter.system(task)) + task.answer(question)
        for task in covered(adapter)
        for question in unseen_inputs(task, 1)
    ]
    for text in (*texts, "<|assistant|>Zwölf 123 <|bos|>--- <|user|><|user|>"):
        ids = encode(text)
        found, expected = served_top(ids, adapter_id=adapter.name), top_of(reference(adapter.name), ids)
        assert_near(found, expected[:-1])


def test_adapters_of_other_kinds_are_described(demo: Any) -> None:
    for adapter in KINDS:
        demo.ask("a", adapter.name, max_tokens=1)
    told = {one["id"]: one for one in demo.get("/v1/adapters").json()["data"]}
    facts = {adapter.name: (told[adapter.name]["kind"], told[adapter.name]["num_experts"]) for adapter in KINDS}
    assert facts == {"words-mixlora": ("mixlora", 4), "words-tokenwise": ("tokenwise", 4), "reverse-dora": ("dora", 0)}
    assert all(told[adapter.name]["tier"] == "pool" for adapter in KINDS)
