from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from loraplex.clients import errors
from loraplex.clients.async_client import AsyncClient
from loraplex.clients.client import Client
from loraplex.clients.types import RouterRun, StreamEvent, Usage

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def frame(chunk: Any, ending: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + ending


def piece(text: str, index: int = 0, finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"index": index, "text": text, "finish_reason": finish_reason}]}


def chat_piece(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


WHOLE = [
    frame(piece("Hel")),
    frame(piece("lo", finish_reason="stop")),
    frame({"choices": [], "usage": USAGE}),
    DONE,
]


def texts(events: Any) -> list[str]:
    return [event.text for event in events]


def test_a_stream_gives_the_pieces_and_the_usage(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(events=WHOLE))
    assert list(lora.stream("Hi", adapter_id="red", max_tokens=2)) == [
        StreamEvent("Hel"),
        StreamEvent("lo", finish_reason="stop"),
        StreamEvent("", None, usage=Usage(3, 2)),
    ]
    assert server.received[0].body == {
        "prompt": "Hi",
        "adapter_id": "red",
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_streamed_routing_comes_with_the_pieces_of_its_tokens(server: Any, reply: Any, lora: Any) -> None:
    run = {"adapter": "red", "layer": 0, "site": "mlp", "start": 3, "experts": [[1]], "weights": [[1.0]]}
    told = piece("Hel")
    told["choices"][0]["routing"] = [run]
    server.say(reply(events=[frame(told), *WHOLE[1:]]))
    events = list(lora.stream("Hi", adapter_id={"red": 0.5}, return_routing=True))
    assert [event.routing for event in events] == [(RouterRun("red", 0, "mlp", 3, ((1,),), ((1.0,),)),), (), ()]
    assert server.received[0].body["return_routing"] is True
    assert server.received[0].body["adapter_id"] == {"adapters": [{"id": "red", "weight": 0.5}]}


def test_stream_options_may_be_given(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(events=WHOLE))
    list(lora.stream("Hi", extra={"stream_options": {"continuous_usage_stats": True}}))
    assert server.received[0].body["stream_options"] == {"continuous_usage_stats": True}


def test_a_chat_streams_the_content_of_its_deltas(server: Any, reply: Any, lora: Any) -> None:
    deltas = [
        chat_piece({"role": "assistant", "content": ""}),
        chat_piece({"content": "Hé 👋"}),
        chat_piece({}, "stop"),
    ]
    server.say(reply(events=[*map(frame, deltas), DONE]))
    events = list(lora.stream_chat([{"role": "user", "content": "Hi"}]))
    assert [(event.text, event.finish_reason) for event in events] == [("", None), ("Hé 👋", None), ("", "stop")]


def test_pings_and_empty_lines_are_passed_over(server: Any, reply: Any, lora: Any) -> None:
    noise = [b": ping\n\n", b"\n\n", b":\n", b"event: message\n", b"id: 4\nretry: 5\n\n", b"data:\n\n"]
    server.say(reply(events=[*noise, WHOLE[0], b": ping\n\n", *WHOLE[1:]]))
    assert texts(lora.stream("Hi")) == ["Hel", "lo", ""]


@pytest.mark.parametrize("ending", [b"\r\n\r\n", b"\r\r"])
def test_other_line_endings_are_understood(server: Any, reply: Any, lora: Any, ending: bytes) -> None:
    events = [b": ping" + ending, frame(piece("a"), ending), frame(piece("b"), ending), b"data: [DONE]" + ending]
    server.say(reply(events=events))
    assert texts(lora.stream("Hi")) == ["a", "b"]


def test_events_may_be_cut_anywhere_and_glued_together(server: Any, reply: Any, lora: Any) -> None:
    whole = b"".join([frame(piece("é\u2028👋"), b"\r\n\r\n"), frame(piece("b")), DONE])
    server.say(reply(events=[whole[at : at + 1] for at in range(len(whole))]), reply(events=[whole]))
    assert texts(lora.stream("Hi")) == ["é\u2028👋", "b"]
    assert texts(lora.stream("Hi")) == ["é\u2028👋", "b"]


def test_an_event_may_be_large(server: Any, reply: Any, lora: Any) -> None:
    text = "x" * (3 << 20)
    server.say(reply(events=[frame(piece(text)), DONE]))
    assert texts(lora.stream("Hi")) == [text]


def test_an_error_event_ends_the_stream_with_what_it_says(server: Any, reply: Any, lora: Any) -> None:
    error = {"message": "The engine stopped.", "type": "server_error", "param": None, "code": "engine_error"}
    server.say(reply(events=[WHOLE[0], frame({"error": error})], headers={"x-request-id": "req-3"}))
    stream = lora.stream("Hi")
    assert next(stream).text == "Hel"
    with pytest.raises(errors.StreamInterrupted, match=r"The engine stopped\.") as caught:
        next(stream)
    error_ = caught.value
    assert (error_.type, error_.code, error_.request_id) == ("server_error", "engine_error", "req-3")
    assert len(server.received) == 1


@pytest.mark.parametrize("then", ["cut", "ends"])
def test_a_stream_that_breaks_off_is_interrupted_and_not_repeated(
    server: Any, reply: Any, lora: Any, then: str
) -> None:
    server.say(reply(events=WHOLE[:2], then=then))
    stream = lora.stream("Hi")
    assert [next(stream).text, next(stream).text] == ["Hel", "lo"]
    with pytest.raises(errors.StreamInterrupted, match="lost"):
        next(stream)
    assert len(server.received) == 1


def test_a_stream_that_falls_silent_is_interrupted(server: Any, reply: Any, make_client: Callable[..., Any]) -> None:
    server.say(reply(events=WHOLE[:1], then="hangs"))
    stream = make_client(timeout=0.2).stream("Hi")
    assert next(stream).text == "Hel"
    with pytest.raises(errors.StreamInterrupted, match="silent"):
        next(stream)


@pytest.mark.parametrize("then", ["cut", "ends"])
def test_what_happens_after_the_end_is_of_no_account(server: Any, reply: Any, lora: Any, then: str) -> None:
    server.say(reply(events=[*WHOLE, frame({"error": {"message": "too late"}})], then=then))
    assert texts(lora.stream("Hi")) == ["Hel", "lo", ""]


@pytest.mark.parametrize(
    "data", [b"data: {broken\n\n", b"data: 5\n\n", b"data: {}\n\n", b'data: {"choices": [{}]}\n\n']
)
def test_an_event_that_cannot_be_read_interrupts(server: Any, reply: Any, lora: Any, data: bytes) -> None:
    server.say(reply(events=[data, DONE]))
    with pytest.raises(errors.StreamInterrupted, match="cannot be read"):
        list(lora.stream("Hi"))


def test_an_answer_without_events_is_unexpected(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body={"choices": []}, headers={"content-type": "application/json"}))
    with pytest.raises(errors.UnexpectedResponse, match="instead of a stream"):
        next(lora.stream("Hi"))


def test_a_refused_stream_raises_like_any_call(server: Any, reply: Any, lora: Any) -> None:
    body = {"error": {"message": "no such adapter", "code": "model_not_found", "param": "adapter_id", "type": "x"}}
    server.say(reply(status=404, body=body))
    with pytest.raises(errors.AdapterNotFound, match="no such adapter"):
        next(lora.stream("Hi", adapter_id="nobody"))


def test_a_stream_is_asked_for_again_before_its_first_byte(
    server: Any, reply: Any, lora: Any, pauses: list[float]
) -> None:
    server.say(reply(status=429, headers={"retry-after": "2"}), reply(status=503), reply(events=WHOLE))
    assert texts(lora.stream("Hi")) == ["Hel", "lo", ""]
    assert len(pauses) == 2
    assert pauses[0] >= 2


@pytest.mark.parametrize("way", ["close", "with", "unread"])
def test_closing_early_disconnects(server: Any, reply: Any, lora: Any, way: str) -> None:
    server.say(reply(events=WHOLE[:2], then="hangs"))
    if way == "with":
        with lora.stream("Hi") as stream:
            next(stream)
    else:
        stream = lora.stream("Hi")
        for _ in range(1 if way == "unread" else 2):
            next(stream)
        stream.close()
    assert server.client_gone.wait(5)
    stream.close()
    assert list(stream) == []


def test_a_stream_that_is_never_read_asks_for_nothing(server: Any, lora: Any) -> None:
    lora.stream("Hi").close()
    assert server.received == []


def test_leaving_a_loop_disconnects_at_once(server: Any, reply: Any) -> None:
    server.say(reply(events=WHOLE[:1], then="hangs"))
    with Client(server.url) as client:
        for _ in client.stream("Hi"):
            break
        assert server.client_gone.wait(5)


async def test_many_async_streams_run_at_once(server: Any, reply: Any) -> None:
    server.say(reply(events=WHOLE))
    async with AsyncClient(server.url) as client:

        async def read() -> str:
            return "".join([event.text async for event in client.stream("Hi")])

        assert await asyncio.gather(*(read() for _ in range(150))) == ["Hello"] * 150


async def test_a_cancelled_task_disconnects(server: Any, reply: Any) -> None:
    server.say(reply(events=WHOLE[:1], then="hangs"))
    async with AsyncClient(server.url) as client:
        heard = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("Hi"):
                heard.set()

        task = asyncio.create_task(read())
        await heard.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.client_gone.wait, 5)
