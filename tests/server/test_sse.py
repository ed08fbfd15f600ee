from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from loraplex.server.errors import EngineError, LoraplexError, OverloadedError
from loraplex.server.http_errors import error_body, public_error
from loraplex.server.sse import EventStream, event, until_disconnect


class Wire:
    """What a stream sent, and when its client goes away."""

    def __init__(self, *, fail_after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._fail_after = fail_after

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._fail_after is not None and len(self.sent) >= self._fail_after:
            raise OSError("connection reset")
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def serve(events: AsyncGenerator[bytes, None], wire: Wire, ping_seconds: float = 15) -> None:
    stream = EventStream(
        events,
        describe_error=lambda error: error_body(public_error(error)),
        ping_seconds=ping_seconds,
        headers={"x-extra": "1"},
    )
    await stream({"type": "http"}, wire.receive, wire.send)


async def of(*items: bytes | Exception | float, closed: list[bool] | None = None) -> AsyncGenerator[bytes, None]:
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, bytes):
                yield item
            else:
                await asyncio.sleep(item)
    finally:
        if closed is not None:
            closed.append(True)


def test_an_event_is_one_line_of_json_between_data_and_an_empty_line() -> None:
    assert event({"text": "a\nb\r\u2028é"}) == 'data: {"text":"a\\nb\\r\u2028é"}\n\n'.encode()


async def test_a_stream_is_its_events_and_done_and_nothing_else() -> None:
    wire = Wire()
    await serve(of(event({"a": 1}), event({"b": 2})), wire)
    assert wire.body == b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-extra"] == b"1"
    assert b"content-length" not in headers
    assert wire.sent[-1] == {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}


async def test_a_failure_before_the_first_event_sends_nothing_and_is_raised() -> None:
    wire = Wire()
    with pytest.raises(OverloadedError):
        await serve(of(OverloadedError("full")), wire)
    assert wire.sent == []


async def test_a_failure_in_mid_stream_is_one_last_event_without_done() -> None:
    wire = Wire()
    await serve(of(event({"a": 1}), EngineError("broke")), wire)
    assert wire.body.split(b"\n\n")[1:] == [
        b'data: {"error":{"message":"broke","type":"server_error","param":null,"code":"engine_error"}}',
        b"",
    ]
    assert wire.sent[-1]["more_body"] is False


async def test_an_unexpected_failure_in_mid_stream_tells_nothing_of_itself() -> None:
    wire = Wire()
    await serve(of(event({"a": 1}), ValueError("secret")), wire)
    assert b"internal_error" in wire.body
    assert b"secret" not in wire.body


async def test_silence_is_filled_with_comments_even_before_the_first_event() -> None:
    wire = Wire()
    await serve(of(0.25, event({"a": 1}), 0.25), wire, ping_seconds=0.1)
    assert wire.body.startswith(b": ping\n\n")
    assert wire.body.replace(b": ping\n\n", b"") == b'data: {"a":1}\n\ndata: [DONE]\n\n'
    assert wire.body.count(b": ping") == 4
    assert [message["type"] for message in wire.sent].count("http.response.start") == 1


async def test_a_failure_after_a_comment_is_an_event() -> None:
    wire = Wire()
    await serve(of(0.15, EngineError("late")), wire, ping_seconds=0.1)
    assert wire.body.startswith(b": ping\n\ndata: {")
    assert wire.sent[0]["status"] == 200


async def test_events_are_closed_when_the_client_goes_away() -> None:
    wire, closed = Wire(), []
    task = asyncio.create_task(serve(of(event({"a": 1}), 30.0, closed=closed), wire))
    await asyncio.sleep(0.02)
    wire.gone.set()
    with pytest.raises(ClientDisconnect):
        await task
    assert closed == [True]


async def test_events_are_closed_when_the_client_goes_away_before_the_first_one() -> None:
    wire, closed = Wire(), []
    task = asyncio.create_task(serve(of(30.0, closed=closed), wire))
    await asyncio.sleep(0.02)
    wire.gone.set()
    with pytest.raises(ClientDisconnect):
        await task
    assert (closed, wire.sent) == ([True], [])


async def test_a_connection_that_fails_to_send_closes_the_events() -> None:
    wire, closed = Wire(fail_after=2), []
    with pytest.raises(ClientDisconnect):
        await serve(of(event({"a": 1}), event({"b": 1}), 30.0, closed=closed), wire)
    assert closed == [True]


async def test_a_cancelled_stream_tells_its_client() -> None:
    wire, closed = Wire(), []
    task = asyncio.create_task(serve(of(event({"a": 1}), 30.0, closed=closed), wire))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True]
    assert b'"code":"unavailable"' in wire.body
    assert b"[DONE]" not in wire.body


async def test_work_is_cancelled_when_the_client_goes_away() -> None:
    wire = Wire()
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    asyncio.get_running_loop().call_later(0.02, wire.gone.set)
    with pytest.raises(ClientDisconnect):
        await until_disconnect(wire.receive, work())
    assert cancelled == [True]


async def test_work_gives_its_result_or_its_error() -> None:
    async def work(error: LoraplexError | None = None) -> int:
        if error is not None:
            raise error
        return 3

    assert await until_disconnect(Wire().receive, work()) == 3
    with pytest.raises(EngineError):
        await until_disconnect(Wire().receive, work(EngineError("broke")))
