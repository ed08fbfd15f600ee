"""Streams, asked for with the real ``openai`` client, and their frames on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from loraplex.server.demo.tasks import CONSONANT_MARK, VOWEL_MARK

KERNEL: Any = [{"role": "user", "content": "kernel"}]
SPELL = "<|bos|><|user|>kernel<|eos|><|assistant|>"
ANSWER = "k-e-r-n-e-l"


@pytest.fixture
def client(demo: Any) -> Any:
    with demo.openai() as client:
        yield client


def chat(client: Any, **options: Any) -> Any:
    asked = {"model": "spell", "messages": KERNEL, "temperature": 0, "stream": True, **options}
    return client.chat.completions.create(**asked)


def complete(client: Any, **options: Any) -> Any:
    return client.completions.create(**{"model": "spell", "prompt": SPELL, "temperature": 0, "stream": True, **options})


def said(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_chat_stream_is_its_answer_token_by_token(client: Any) -> None:
    chunks = list(chat(client))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert said(chunks) == ANSWER
    assert [chunk.choices[0].delta.content for chunk in chunks[1 : 1 + len(ANSWER)]] == list(ANSWER)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_completion_stream_is_its_answer(client: Any) -> None:
    chunks = list(complete(client))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_async_client_streams(demo: Any) -> None:
    async with demo.async_openai() as client:
        chunks = [chunk async for chunk in await chat(client)]
        texts = [chunk.choices[0].text async for chunk in await complete(client)]
    assert said(chunks) == "".join(texts) == ANSWER


def test_usage_comes_last_where_asked_for(client: Any) -> None:
    *chunks, last = chat(client, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, len(ANSWER) + 1)


def test_continuous_usage_grows_with_every_chunk(client: Any) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(client, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, last.usage.completion_tokens)
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {10}


def test_choices_are_streamed_side_by_side(client: Any) -> None:
    chunks = list(chat(client, n=3, seed=5))
    assert [said(chunks, index) for index in range(3)] == [ANSWER] * 3
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_sampled_streams_are_what_the_same_seed_answers_in_one_body(client: Any) -> None:
    asked: Any = {"prompt": "<|user|>", "temperature": 1, "seed": 3, "max_tokens": 30, "n": 2}
    body = complete(client, **asked, stream=False)
    chunks = list(complete(client, **asked))
    for choice in body.choices:
        streamed = [one.text for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(streamed) == choice.text


def test_log_probabilities_are_streamed_with_their_tokens(client: Any) -> None:
    chunks = list(chat(client, logprobs=True, top_logprobs=1))
    told = [one for chunk in chunks for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content]
    assert "".join(one.token for one in told if one.token != "<|eos|>") == ANSWER
    chunks = list(complete(client, logprobs=1))
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert "".join(tokens).removesuffix("<|eos|>") == ANSWER


@pytest.mark.parametrize("stop", ["-r-n", "rn"])
def test_a_stream_never_shows_part_of_a_stop_string(client: Any, stop: str) -> None:
    chunks = list(complete(client, stop=stop))
    expected = ANSWER.partition(stop)[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_half_a_character_is_never_streamed(client: Any) -> None:
    question: Any = [{"role": "user", "content": "lora"}]
    chunks = list(chat(client, model="emoji", messages=question, stream_options={"include_usage": True}))
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert pieces == [CONSONANT_MARK, VOWEL_MARK, CONSONANT_MARK, VOWEL_MARK]
    assert chunks[-1].usage.completion_tokens == 4 * len(VOWEL_MARK.encode()) + 1


def test_a_character_that_the_limit_cuts_is_not_shown_as_rubbish_in_mid_text(client: Any) -> None:
    question: Any = [{"role": "user", "content": "lora"}]
    chunks = list(chat(client, model="emoji", messages=question, max_tokens=6))
    assert said(chunks).rstrip("\N{REPLACEMENT CHARACTER}") == CONSONANT_MARK


def test_the_stream_helper_of_the_client_reads_our_events(client: Any) -> None:
    with client.chat.completions.stream(model="spell", messages=KERNEL, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_every_frame_is_one_line_of_data_and_done_is_the_last(demo: Any) -> None:
    body = {"model": "spell", "messages": KERNEL, "stream": True, "temperature": 0}
    with httpx2.stream("POST", f"{demo.url}/v1/chat/completions", json=body, verify=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(answer.iter_raw())
    assert b"\r" not in raw
    *frames, done, nothing = raw.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert all(json.loads(frame.removeprefix(b"data: "))["object"] == "chat.completion.chunk" for frame in frames)
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
