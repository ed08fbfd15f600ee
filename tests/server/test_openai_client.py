"""The real ``openai`` package against a real socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from loraplex.server.errors import EngineError, OverloadedError

HI: Any = [{"role": "user", "content": "hi"}]


def client_of(server: Any, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=options.pop("api_key", "none"), **options)


def async_client_of(server: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_chat_completions_models_and_adapters_work(serve: Any, engine: Any) -> None:
    with client_of(serve()) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_completion_tokens=5, n=2, extra_body={"adapter_id": "red"}
        )
        assert [choice.message.content for choice in answer.choices] == ["Hello", "ello,"]
        assert answer.usage is not None
        assert answer.usage.total_tokens == 31
        assert answer._request_id is not None
        assert engine.commands[0].adapter.name == "red"
        assert [model.id for model in client.models.list()] == ["tiny", "blue", "red"]
        assert client.models.retrieve("red").owned_by == "loraplex"


def test_mixes_and_merges_are_asked_for_in_the_extra_body(serve: Any, engine: Any) -> None:
    mix = {"adapters": [{"id": "red", "weight": 0.7}, {"id": "blue", "weight": 0.3}]}
    merged = {"ids": ["red", "blue"], "weights": [1.0, 0.5], "merge_strategy": "ties", "density": 0.5}
    with client_of(serve(), max_retries=0) as client:
        answer = client.chat.completions.create(model="tiny", messages=HI, extra_body={"adapter_id": mix})
        assert answer.model == "tiny"
        client.completions.create(model="", prompt="a", extra_body={"merged_adapters": merged})
        extra = {"adapter_id": {"adapters": [{"id": "green"}]}}
        with pytest.raises(openai.NotFoundError, match="'green'") as unknown:
            client.completions.create(model="tiny", prompt="a", extra_body=extra)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "adapter_id")
        with pytest.raises(openai.BadRequestError) as contradiction:
            client.completions.create(model="red", prompt="a", extra_body={"adapter_id": mix})
        assert contradiction.value.param == "adapter_id"
    mixed, ties = engine.commands
    assert [(one.adapter.name, one.weight) for one in mixed.mix] == [("red", 0.7), ("blue", 0.3)]
    assert ties.adapter.path.startswith("merged:")


@pytest.mark.parametrize("stream", [False, True])
def test_routing_is_an_extra_field_of_choices(serve: Any, engine: Any, stream: bool) -> None:
    engine.script.routed_layers = 1
    with client_of(serve()) as client:
        extra = {"adapter_id": "red", "return_routing": True}
        answer: Any = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=3, stream=stream, extra_body=extra
        )
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    runs = [run for choice in choices for run in (choice.model_extra or {}).get("routing", ())]
    assert sum(len(run["experts"]) for run in runs) == 21 + 2
    assert {run["site"] for run in runs} == {"mlp"}


def test_chat_streams_with_usage_and_logprobs(serve: Any) -> None:
    with client_of(serve()) as client:
        stream = client.chat.completions.create(
            model="red",
            messages=HI,
            max_tokens=4,
            stream=True,
            logprobs=True,
            top_logprobs=2,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hell"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    tokens = [
        one.token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert tokens == list("Hell")


def test_the_stream_helper_of_the_client_reads_our_events(serve: Any, engine: Any) -> None:
    engine.script.eos_after = 4
    with client_of(serve()) as client, client.chat.completions.stream(model="tiny", messages=HI) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hell"


def test_completions_score_prompts(serve: Any) -> None:
    with client_of(serve()) as client:
        answer = client.completions.create(
            model="tiny", prompt=[[64, 65], [66, 67]], max_tokens=1, logprobs=1, echo=True, temperature=0
        )
    assert [choice.text for choice in answer.choices] == ["abH", "cdH"]
    assert answer.choices[1].logprobs is not None
    assert answer.choices[1].logprobs.token_logprobs == [None, -0.5, -0.5]


def test_errors_have_the_classes_of_the_client(serve: Any) -> None:
    with client_of(serve(), max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            client.chat.completions.create(model="none", messages=HI)
        assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=HI, temperature=3)
        assert bad.value.param == "temperature"
    server = serve(api_keys=frozenset({"right"}))
    with client_of(server, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_useless_retries_are_stopped_and_useful_ones_are_not(serve: Any, engine: Any) -> None:
    with client_of(serve(), max_retries=2) as client:
        engine.script.error = EngineError("broke")
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a")
        assert len(engine.commands) == 1
        engine.script.error = OverloadedError("full")
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=1).completions.create(model="tiny", prompt="a")
        assert len(engine.commands) == 3


def test_an_error_in_mid_stream_is_raised_by_the_client(serve: Any, engine: Any) -> None:
    engine.script.error, engine.script.error_after = EngineError("broke"), 2
    with client_of(serve()) as client:
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="broke"):
            list(stream)


def test_closing_a_stream_aborts_the_request(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.02
    with client_of(serve()) as client:
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True, n=2)
        next(iter(stream))
        stream.close()
    assert eventually(lambda: engine.aborted == [engine.commands[0].request_id])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_hanging_up_before_the_first_token_aborts_the_request(
    serve: Any, engine: Any, path: str, streamed: bool
) -> None:
    engine.script.first_delay = 30
    server = serve()
    body: Any = {"prompt": ["a", "b"]} if path == "/v1/completions" else {"messages": HI}
    client = async_client_of(server)
    call = asyncio.create_task(client.post(path.removeprefix("/v1"), cast_to=object, body=body | {"stream": streamed}))
    assert await asyncio.to_thread(eventually, lambda: len(engine.commands) == len(body.get("prompt", "a")))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await client.close()
    assert await asyncio.to_thread(eventually, lambda: len(engine.aborted) == len(engine.commands))
    assert await asyncio.to_thread(eventually, lambda: server.server._lifecycle.in_flight == 0)


async def test_many_streams_at_once_each_get_their_own_answer(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.001
    async with async_client_of(serve()) as client:

        async def one(length: int) -> str:
            stream = await client.completions.create(model="tiny", prompt="a", max_tokens=length, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(one, range(1, 33)))
    assert texts == [("Hello, world! " * 3)[:length] for length in range(1, 33)]
    assert engine.aborted == []


async def test_breaking_out_of_an_async_stream_aborts_the_request(serve: Any, engine: Any) -> None:
    engine.script.delay = 0.02
    async with async_client_of(serve()) as client:
        stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
        async for _ in stream:
            break
        await stream.close()
    assert await asyncio.to_thread(eventually, lambda: len(engine.aborted) == 1)
