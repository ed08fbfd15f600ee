"""Requests that cannot be served: each is told why, by the class that the real client has for it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

BASE = "loraplex-demo"
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(demo: Any) -> Any:
    with demo.openai() as client:
        yield client
    assert demo.ask("loraplex", "upper") == "LORAPLEX"  # and it goes on serving


def refusal(client: Any, **options: Any) -> openai.BadRequestError:
    create = client.completions.create if "prompt" in options else client.chat.completions.create
    body = {"model": BASE, **({} if "prompt" in options else {"messages": HI}), **options}
    with pytest.raises(openai.BadRequestError) as caught:
        create(**body)
    return caught.value


def test_two_different_adapters_in_one_request_are_a_conflict(client: Any) -> None:
    error = refusal(client, model="upper", extra_body={"adapter_id": "reverse"})
    assert error.param == "adapter_id"
    assert "'upper'" in error.message
    assert "'reverse'" in error.message


@pytest.mark.parametrize("name", ["nobody", "../adapters/upper", "upper,reverse", f"{BASE}:nobody", "x" * 5000])
def test_unknown_names_are_not_found(client: Any, name: str) -> None:
    for field, body in (("model", {"model": name}), ("adapter_id", {"extra_body": {"adapter_id": name}})):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(**{"model": BASE, "messages": HI, **body})
        assert (caught.value.code, caught.value.param) == ("model_not_found", field)


async def test_the_async_client_raises_the_same(demo: Any) -> None:
    async with demo.async_openai() as client:
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=HI)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=HI, stream=True)


def test_a_too_long_prompt_is_refused_with_the_numbers(client: Any) -> None:
    error = refusal(client, prompt="a" * 5000)
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert "5000" in error.message
    assert "1024" in error.message
    error = refusal(client, messages=[{"role": "user", "content": "a" * 1024}])
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert "1028" in error.message


def test_a_prompt_that_fills_the_context_is_served(client: Any) -> None:
    answer = client.completions.create(model=BASE, prompt="a" * 1023, max_tokens=50, temperature=0)
    assert answer.usage.prompt_tokens == 1023
    assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": 2.5}),
        ("top_p", {"top_p": 1.5}),
        ("n", {"n": 0}),
        ("n", {"n": 100_000}),
        ("max_tokens", {"max_tokens": "ten"}),
        ("max_tokens", {"max_tokens": 0}),
        ("seed", {"seed": 0.5}),
        ("stop", {"stop": [1]}),
        ("logit_bias", {"logit_bias": {"300": 1}}),
        ("logit_bias[5]", {"logit_bias": {"5": 101}}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "king", "content": "hi"}]}),
        ("messages", {"messages": [{"role": "tool", "content": "hi", "tool_call_id": "1"}]}),
        ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("prompt", {"prompt": [[1, 2], "a"]}),
        ("prompt", {"prompt": [272]}),
        ("prompt", {"prompt": ""}),
        ("logprobs", {"prompt": "a", "logprobs": 21}),
        ("min_tokens", {"prompt": "a", "max_tokens": 4, "extra_body": {"min_tokens": 5}}),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(client: Any, param: str, fields: dict[str, Any]) -> None:
    error = refusal(client, **fields)
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert param.partition("[")[0] in error.message


@pytest.mark.parametrize(
    "fields",
    [{"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"modalities": ["audio"]}],
)
def test_what_is_not_served_is_refused_and_not_ignored(client: Any, fields: dict[str, Any]) -> None:
    error = refusal(client, **fields)
    assert (error.code, error.param) == ("unsupported_parameter", next(iter(fields)))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/completions", 400)],
)
def test_what_the_framework_refuses_has_the_same_shape(demo: Any, method: str, path: str, status: int) -> None:
    answer = demo.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_server_with_keys_wants_one_of_them(guarded: Any) -> None:
    for key in ("first-key", "second-key"):
        with guarded.openai(api_key=key) as client:
            assert next(iter(client.models.list())).id == "guarded"
    for key in ("third-key", "first-key,second-key", "FIRST-KEY"):
        with guarded.openai(api_key=key) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    assert guarded.request("POST", "/v1/load_lora_adapter", headers={"authorization": ""}).status_code == 401
    assert "first-key" not in guarded.log


def test_health_and_metrics_are_open_where_keys_are_wanted(guarded: Any) -> None:
    for path in ("/health", "/livez", "/readyz", "/version", "/metrics"):
        assert guarded.request("GET", path, headers={"authorization": ""}).status_code == 200


def test_a_strict_server_refuses_unknown_fields(guarded: Any) -> None:
    with guarded.openai() as client:
        error = refusal(client, model="guarded", extra_body={"colour": 1})
    assert (error.code, error.param) == ("unknown_parameter", "colour")
