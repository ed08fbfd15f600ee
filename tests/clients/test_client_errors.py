from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from loraplex.clients import errors
from loraplex.clients.errors import ErrorDetails, LoraplexClientError

GOOD = {
    "id": "cmpl-1",
    "model": "red",
    "choices": [{"index": 0, "text": "fine", "finish_reason": "stop"}],
    "usage": None,
}


def error_body(message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "some_error", "param": None, "code": None} | fields}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "adapter_invalid", errors.BadRequest),
        (401, "invalid_api_key", errors.AuthenticationFailed),
        (403, None, errors.AuthenticationFailed),
        (404, "model_not_found", errors.AdapterNotFound),
        (404, "not_found", errors.NotFound),
        (405, None, errors.BadRequest),
        (409, "conflict", errors.Conflict),
        (413, "payload_too_large", errors.RequestTooLarge),
        (422, None, errors.BadRequest),
        (429, "overloaded", errors.Overloaded),
        (500, "engine_error", errors.ServerError),
        (503, "unavailable", errors.Unavailable),
    ],
)
def test_each_status_has_its_error(
    server: Any, reply: Any, make_client: Callable[..., Any], status: int, code: str | None, expected: type
) -> None:
    body = error_body("It is wrong.", param="adapter_id", code=code)
    server.say(reply(status=status, body=body, headers={"x-request-id": "req-1"}))
    with pytest.raises(LoraplexClientError, match=r"^It is wrong\.$") as caught:
        make_client(max_retries=0).generate("Hi")
    error = caught.value
    assert type(error) is expected
    assert (error.status, error.type, error.param, error.code) == (status, "some_error", "adapter_id", code)
    assert (error.message, error.request_id) == ("It is wrong.", "req-1")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "in words"}, "in words"),
        ({"detail": "Not Found"}, "Not Found"),
        ("Bad Gateway", "Bad Gateway"),
        ("", "502"),
        ({"error": {"code": 502}}, "502"),
    ],
)
def test_errors_of_other_servers_are_told_as_they_come(
    server: Any, reply: Any, lora: Any, body: Any, message: str
) -> None:
    server.say(reply(status=502, body=body))
    with pytest.raises(errors.ServerError, match=message):
        lora.version()


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.Overloaded(ErrorDetails("full", status=429, retry_after=2.0))))
    assert type(error) is errors.Overloaded
    assert (str(error), error.status, error.retry_after) == ("full", 429, 2.0)


def test_a_server_that_is_not_there_cannot_be_reached(make_client: Callable[..., Any], pauses: list[float]) -> None:
    with pytest.raises(errors.ConnectionFailed, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        make_client("http://127.0.0.1:9").generate("Hi")
    assert len(pauses) == 2


def test_a_silent_server_times_out_and_is_not_asked_again(
    server: Any, reply: Any, make_client: Callable[..., Any]
) -> None:
    server.say(reply(then="hangs"))
    with pytest.raises(errors.TimedOut, match="did not answer in time"):
        make_client(timeout=0.1).generate("Hi")
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_asked_again(
    server: Any, reply: Any, lora: Any, pauses: list[float], status: int
) -> None:
    server.say(reply(status=status), reply(status=status), reply(body=GOOD))
    assert lora.generate("Hi").text == "fine"
    assert len(server.received) == 3
    assert 0.375 <= pauses[0] <= 0.5
    assert 0.75 <= pauses[1] <= 1.0


def test_an_answer_that_breaks_off_is_asked_for_again(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=GOOD, then="cut"), reply(body=GOOD))
    assert lora.generate("Hi").text == "fine"
    assert len(server.received) == 2


def test_an_unloading_whose_answer_was_lost_is_not_repeated(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(then="cut"))
    with pytest.raises(errors.ConnectionFailed, match="broke"):
        lora.unload_adapter("red")
    assert len(server.received) == 1
    server.say(reply(status=503), reply())
    lora.unload_adapter("red")
    assert len(server.received) == 3


def test_the_last_error_is_raised_when_all_attempts_failed(
    server: Any, reply: Any, make_client: Callable[..., Any]
) -> None:
    server.say(reply(status=429), reply(status=503, body=error_body("later")))
    with pytest.raises(errors.Unavailable, match="later"):
        make_client(max_retries=3).generate("Hi")
    assert len(server.received) == 4


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
    ],
)
def test_the_server_says_how_long_to_wait(
    server: Any, reply: Any, lora: Any, pauses: list[float], headers: dict[str, str], least: float
) -> None:
    server.say(reply(status=429, headers=headers), reply(body=GOOD))
    lora.generate("Hi")
    assert len(pauses) == 1
    assert least <= pauses[0] <= least * 1.25


def test_a_date_says_how_long_to_wait(server: Any, reply: Any, lora: Any, pauses: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    server.say(reply(status=429, headers={"retry-after": date}), reply(body=GOOD))
    lora.generate("Hi")
    [pause] = pauses
    assert 30 <= pause <= 75


@pytest.mark.parametrize("value", ["later", "-1", "nan", "Mon, 99 Foo"])
def test_an_unreadable_wait_is_as_good_as_none(
    server: Any, reply: Any, lora: Any, pauses: list[float], value: str
) -> None:
    server.say(reply(status=429, headers={"retry-after": value}), reply(body=GOOD))
    lora.generate("Hi")
    assert 0.375 <= pauses[0] <= 0.5


def test_too_long_a_wait_is_left_to_the_caller(server: Any, reply: Any, lora: Any, pauses: list[float]) -> None:
    server.say(reply(status=429, headers={"retry-after": "121"}))
    with pytest.raises(errors.Overloaded) as caught:
        lora.generate("Hi")
    assert caught.value.retry_after == 121
    assert pauses == []


def test_the_server_may_forbid_to_ask_again(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(status=503, headers={"x-should-retry": "false"}))
    with pytest.raises(errors.Unavailable) as caught:
        lora.generate("Hi")
    assert len(server.received) == 1
    assert not caught.value.retryable


def test_the_server_may_wish_to_be_asked_again(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(status=500, headers={"x-should-retry": "true"}), reply(body=GOOD))
    assert lora.generate("Hi").text == "fine"


@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_what_cannot_get_better_is_not_asked_again(server: Any, reply: Any, lora: Any, status: int) -> None:
    server.say(reply(status=status))
    with pytest.raises(LoraplexClientError):
        lora.generate("Hi")
    assert len(server.received) == 1
