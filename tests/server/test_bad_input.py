"""Every fault of a request is a 400 in OpenAI's shape that names the field, and never reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

HI = [{"role": "user", "content": "hi"}]
UNSUPPORTED = "unsupported_parameter"

COMMON: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "1"}),
    ("temperature", {"temperature": True}),
    ("temperature", {"temperature": 10**400}),
    ("top_p", {"top_p": 1.01}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("min_p", {"min_p": 2}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": "1"}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": True}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 5.5}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 3}),
    ("stop", {"stop": 3}),
    ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": ["x" * 2000]}),
    ("stop_token_ids", {"stop_token_ids": [258]}),
    ("stop_token_ids[0]", {"stop_token_ids": ["1"]}),
    ("logit_bias", {"logit_bias": {"258": 1}}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias[5]", {"logit_bias": {"5": 101}}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": True}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": 1}}),
    ("ignore_eos", {"ignore_eos": 1}),
    ("skip_special_tokens", {"skip_special_tokens": "no"}),
    ("model", {"model": 3}),
    ("adapter_id", {"adapter_id": ["red"]}),
    ("adapter_id", {"adapter_id": 3}),
    ("adapter_id.adapters", {"adapter_id": {}}),
    ("adapter_id.adapters", {"adapter_id": {"adapters": []}}),
    ("adapter_id.adapters", {"adapter_id": {"adapters": {"id": "red"}}}),
    ("adapter_id.adapters[0]", {"adapter_id": {"adapters": ["red"]}}),
    ("adapter_id.adapters[0].id", {"adapter_id": {"adapters": [{"weight": 1}]}}),
    ("adapter_id.adapters[0].id", {"adapter_id": {"adapters": [{"id": ""}]}}),
    ("adapter_id.adapters[1].id", {"adapter_id": {"adapters": [{"id": "red"}, {"id": 3}]}}),
    ("adapter_id.adapters[0].weight", {"adapter_id": {"adapters": [{"id": "red", "weight": "1"}]}}),
    ("adapter_id.adapters[0].weight", {"adapter_id": {"adapters": [{"id": "red", "weight": True}]}}),
    ("adapter_id.adapters[0].weight", {"adapter_id": {"adapters": [{"id": "red", "weight": 100.1}]}}),
    ("adapter_id.adapters[0].weight", {"adapter_id": {"adapters": [{"id": "red", "weight": -101}]}}),
    ("adapter_id.adapters[0].weight", {"adapter_id": {"adapters": [{"id": "red", "weight": 10**400}]}}),
    ("adapter_id.adapters[0].wieght", {"adapter_id": {"adapters": [{"id": "red", "wieght": 0.5}]}}),
    ("adapter_id.weights", {"adapter_id": {"adapters": [{"id": "red"}], "weights": [1]}}),
    ("merged_adapters", {"merged_adapters": ["red"]}),
    ("merged_adapters.ids", {"merged_adapters": {}}),
    ("merged_adapters.ids", {"merged_adapters": {"ids": []}}),
    ("merged_adapters.ids", {"merged_adapters": {"ids": "red"}}),
    ("merged_adapters.ids[0]", {"merged_adapters": {"ids": [""]}}),
    ("merged_adapters.weights[1]", {"merged_adapters": {"ids": ["a", "b"], "weights": [1, 200]}}),
    ("merged_adapters", {"merged_adapters": {"ids": ["a", "b"], "weights": [1]}}),
    ("merged_adapters.merge_strategy", {"merged_adapters": {"ids": ["a"], "merge_strategy": "svd"}}),
    ("merged_adapters.density", {"merged_adapters": {"ids": ["a"], "merge_strategy": "ties", "density": 1.1}}),
    ("merged_adapters.majority_sign_method", {"merged_adapters": {"ids": ["a"], "majority_sign_method": "vote"}}),
    ("merged_adapters.densities", {"merged_adapters": {"ids": ["a"], "densities": [1]}}),
    ("return_routing", {"return_routing": "yes"}),
    ("metadata", {"metadata": {str(at): "" for at in range(17)}}),
    ("metadata.a", {"metadata": {"a": 1}}),
    ("service_tier", {"service_tier": "gold"}),
]
COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1, True]}),
    ("prompt", {"prompt": {"text": "a"}}),
    ("prompt", {"prompt": [258]}),
    ("prompt", {"prompt": [[1], [-1]]}),
    ("prompt", {"prompt": ["a"] * 2049}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("echo", {"echo": "true"}),
]
CHAT: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "hi"}]}),
    ("messages[0].role", {"messages": [{"content": "hi"}]}),
    ("messages[0]", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}),
    ("messages[0].tool_calls[0].id", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
    ("messages", {"messages": [{"role": "function", "name": "f", "content": "x"}]}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("max_tokens", {"max_tokens": 0}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}),
    ("chat_template_kwargs", {"chat_template_kwargs": []}),
    ("continue_final_message", {"continue_final_message": True}),
    ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
    ("reasoning_effort", {"reasoning_effort": "extreme"}),
]
NOT_SERVED: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a*"}}),
    ("audio", {"audio": {"voice": "x"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("web_search_options", {"web_search_options": {}}),
    ("prediction", {"prediction": {}}),
    ("chat_template", {"chat_template": "{{ 1 }}"}),
]


def fault(client: TestClient, path: str, body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.fixture
def client(shared_client: TestClient) -> Any:
    yield shared_client
    app: Any = shared_client.app
    assert app.state.edge.engine.commands == []


@pytest.mark.parametrize(("param", "fields"), COMMON + CHAT)
def test_a_chat_fault_names_its_field(client: TestClient, param: str, fields: dict[str, Any]) -> None:
    error = fault(client, "/v1/chat/completions", {"model": "tiny", "messages": HI} | fields)
    assert error["param"] == param
    assert param.partition("[")[0] in error["message"] or "template" in error["message"]


@pytest.mark.parametrize(("param", "fields"), COMMON + COMPLETIONS)
def test_a_completion_fault_names_its_field(client: TestClient, param: str, fields: dict[str, Any]) -> None:
    error = fault(client, "/v1/completions", {"model": "tiny", "prompt": "hi"} | fields)
    assert error["param"] == param
    assert param.partition("[")[0] in error["message"]


@pytest.mark.parametrize(("param", "fields"), NOT_SERVED)
def test_what_would_change_the_answer_is_refused_by_name(
    client: TestClient, param: str, fields: dict[str, Any]
) -> None:
    error = fault(client, "/v1/chat/completions", {"messages": HI} | fields)
    assert (error["param"], error["code"]) == (param, UNSUPPORTED)


@pytest.mark.parametrize(("param", "fields"), [("suffix", {"suffix": "x"}), ("best_of", {"best_of": 3, "n": 2})])
def test_completions_have_no_suffix_and_no_best_of(client: TestClient, param: str, fields: dict[str, Any]) -> None:
    error = fault(client, "/v1/completions", {"prompt": "hi"} | fields)
    assert (error["param"], error["code"]) == (param, UNSUPPORTED)


def test_an_image_is_refused_as_not_served(client: TestClient) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    error = fault(client, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert (error["param"], error["code"]) == ("messages[0].content", UNSUPPORTED)
    assert "image_url" in error["message"]


def test_a_missing_field_is_named(client: TestClient) -> None:
    assert fault(client, "/v1/completions", {})["param"] == "prompt"
    assert fault(client, "/v1/chat/completions", {})["param"] == "messages"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "adapter_id": {"adapters": [{"id": "red", "weight": NaN}]}}',
        b'{"prompt": "a", "adapter_id": {"adapters": [{"id": "red", "weight": 1e999}]}}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"x":' + b"[" * 10_000,
    ],
    ids=lambda raw: raw[:24].decode("latin-1"),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"])
def test_a_malformed_body_is_a_shaped_400(client: TestClient, path: str, raw: bytes) -> None:
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_declared_as_json_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "content-type" in answer.json()["error"]["message"]


def test_json_with_a_charset_is_json(client: TestClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    answer = client.post("/v1/completions", content=b'{"prompt":3}', headers=headers)
    assert answer.json()["error"]["param"] == "prompt"


def test_a_too_large_body_is_a_shaped_413(make_client: Any) -> None:
    client = make_client(max_body_bytes=100)
    announced = client.post("/v1/completions", json={"prompt": "a" * 200})
    streamed = client.post(
        "/v1/completions", content=iter([b"a" * 60, b"a" * 60]), headers={"content-type": "application/json"}
    )
    for answer in (announced, streamed):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"
        assert "100 bytes" in answer.json()["error"]["message"]


def test_a_strict_server_refuses_unknown_fields(make_client: Any) -> None:
    error = fault(make_client(strict_requests=True), "/v1/completions", {"prompt": "hi", "spice": 1})
    assert (error["param"], error["code"]) == ("spice", "unknown_parameter")


def test_a_hostile_field_name_is_made_printable(make_client: Any) -> None:
    error = fault(make_client(strict_requests=True), "/v1/completions", {"prompt": "hi", "a\r\nb: ü": 1})
    assert error["param"] == "a??b???"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/nope", 404), ("/v1/nope", 404), ("/v1/chat/completions/", 404), ("/v1/models/none", 404)],
)
def test_unknown_routes_and_models_are_shaped(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_wrong_method_is_shaped_and_names_the_right_one(client: TestClient) -> None:
    answer = client.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_a_wrong_query_parameter_is_a_shaped_400(client: TestClient) -> None:
    for value in ("0", "x"):
        answer = client.get("/v1/models", params={"limit": value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("name", ["../red", "a/b", "/etc/passwd", "red\0", "red,blue", "x" * 300, "tiny:nope", "TINY"])
@pytest.mark.parametrize("field", ["model", "adapter_id"])
def test_a_name_that_is_not_registered_is_a_404_that_names_its_field(client: TestClient, field: str, name: str) -> None:
    answer = client.post("/v1/completions", content=json.dumps({"prompt": "a", field: name}), headers=JSON)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", field, "not_found_error")
    assert len(error["message"]) < 400


JSON = {"content-type": "application/json"}
