from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.errors import ContextLengthError, EngineError, OverloadedError, UnavailableError
from loraplex.server.messages import AdapterInfo, AdapterRef, SamplingParams

HI = [{"role": "user", "content": "hi"}]


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 5} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 5} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def stream(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def stream_chat(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    return stream(client, "/v1/chat/completions", {"messages": HI, "max_tokens": 5} | fields)


def test_a_completion_has_the_openai_shape(client: TestClient) -> None:
    body = complete(client, model="tiny")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert body["system_fingerprint"].startswith("fp_")


def test_a_chat_completion_has_the_openai_shape(client: TestClient, engine: Any, tokenizer: Any) -> None:
    body = chat(client)
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = tokenizer.decode(engine.commands[0].prompt_ids, skip_special=False)
    assert prompt == "<|bos|><user>hi<|eos|><assistant>"


def test_the_end_token_ends_an_answer_and_is_counted_but_not_shown(client: TestClient, engine: Any) -> None:
    engine.script.eos_after = 3
    body = chat(client)
    assert body["choices"][0]["message"]["content"] == "Hel"
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("stop", 4)


def test_all_sampling_fields_reach_the_engine(client: TestClient, engine: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "seed": 1234,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_tokens": 2,
        "n": 2,
    }
    complete(client, **fields)
    command = engine.commands[0]
    assert command.n == 2
    assert command.params == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={5: -100.0},
        seed=1234,
        stop_token_ids=(3,),
        ignore_eos=True,
        min_tokens=2,
    )


def test_null_is_as_good_as_absent_and_off_is_off(client: TestClient, engine: Any) -> None:
    names = ["temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logit_bias", "stream", "user", "tools"]
    complete(client, **dict.fromkeys([*names, "stream_options", "suffix", "logprobs"]))
    complete(client, top_k=-1, top_p=0, stop=[], logit_bias={})
    first, second = (command.params for command in engine.commands)
    assert first == SamplingParams(max_tokens=5)
    assert (second.top_k, 0 < second.top_p < 0.001) == (0, True)


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/completions", {"prompt": "ab"}, 16),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 10_000}, 254),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 0}, 0),
        ("/v1/chat/completions", {"messages": HI}, 256 - 21),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 7}, 7),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 7, "max_completion_tokens": 8}, 8),
    ],
)
def test_the_length_is_what_was_asked_cut_to_the_context(
    client: TestClient, engine: Any, path: str, fields: dict[str, Any], expected: int
) -> None:
    assert client.post(path, json=fields).status_code == 200
    assert engine.commands[0].params.max_tokens == expected


def test_a_prompt_as_long_as_the_context_can_only_be_scored(client: TestClient, engine: Any) -> None:
    assert complete(client, prompt=[1] * 256, max_tokens=0)["usage"]["completion_tokens"] == 0
    answer = client.post("/v1/completions", json={"prompt": [1] * 256})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "256" in error["message"]


def test_a_prompt_that_the_pool_can_never_hold_is_refused_with_the_numbers(client: TestClient, engine: Any) -> None:
    engine.num_pages = 3
    answer = client.post("/v1/completions", json={"prompt": [1] * 48})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "need 4 pages; the pool has 3" in answer.json()["error"]["message"]
    complete(client, prompt=[1] * 47, max_tokens=100)
    assert engine.commands[0].params.max_tokens == 1


def test_an_adapters_pages_are_not_there_for_its_prompts(client: TestClient, engine: Any, registry: Any) -> None:
    engine.num_pages = 3
    known = registry.get("red")
    info = engine_info_of(known.ref, pages=2)
    registry.register(known.ref, info)
    assert client.post("/v1/completions", json={"prompt": [1] * 16, "model": "red"}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": [1] * 16}).status_code == 200


def engine_info_of(ref: AdapterRef, pages: int) -> Any:
    return AdapterInfo(identity="i", kind="lora", rank=1, targets=[], bytes=1, pages=pages)


@pytest.mark.parametrize(
    ("fields", "adapter", "echoed"),
    [
        ({}, None, "tiny"),
        ({"model": ""}, None, "tiny"),
        ({"model": None, "adapter_id": None}, None, "tiny"),
        ({"model": "tiny", "adapter_id": ""}, None, "tiny"),
        ({"model": "tiny", "adapter_id": "tiny"}, None, "tiny"),
        ({"model": "red"}, "red", "red"),
        ({"model": "tiny:red"}, "red", "tiny:red"),
        ({"model": "tiny", "adapter_id": "red"}, "red", "tiny"),
        ({"adapter_id": "red"}, "red", "red"),
        ({"model": "red", "adapter_id": "red"}, "red", "red"),
        ({"model": "red", "adapter_id": ""}, "red", "red"),
        ({"model": "tiny:red", "adapter_id": "red"}, "red", "tiny:red"),
    ],
)
def test_model_and_adapter_id_name_the_adapter(
    client: TestClient, engine: Any, fields: dict[str, Any], adapter: str | None, echoed: str
) -> None:
    assert chat(client, **fields)["model"] == echoed
    ref = engine.commands[0].adapter
    assert (ref and ref.name) == adapter


@pytest.mark.parametrize("adapter_id", ["blue", "tiny"])
def test_a_model_and_an_adapter_id_that_differ_are_refused(client: TestClient, adapter_id: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "model": "red", "adapter_id": adapter_id})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter_id")


def test_choices_of_many_prompts_are_numbered_prompt_by_prompt(client: TestClient, engine: Any) -> None:
    body = complete(client, prompt=["a", "b", "c"], n=2, max_tokens=3)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "Hel"),
        (1, "ell"),
        (2, "Hel"),
        (3, "ell"),
        (4, "Hel"),
        (5, "ell"),
    ]
    assert [command.prompt_ids for command in engine.commands] == [[64], [65], [66]]
    assert len({command.request_id for command in engine.commands}) == 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 18)


def test_token_id_prompts_are_taken_as_they_are(client: TestClient, engine: Any) -> None:
    complete(client, prompt=[5, 6, 7])
    complete(client, prompt=[[1, 2], [3]])
    assert [command.prompt_ids for command in engine.commands] == [[5, 6, 7], [1, 2], [3]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_scored_prompt_is_what_an_evaluation_harness_reads(client: TestClient, max_tokens: int) -> None:
    body = complete(
        client,
        prompt=[[64, 65, 66], [67, 68]],
        max_tokens=max_tokens,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    first, second = (choice["logprobs"] for choice in body["choices"])
    tail = ["H"] * max_tokens
    assert [choice["text"] for choice in body["choices"]] == ["abc" + "".join(tail), "de" + "".join(tail)]
    assert (first["tokens"], second["tokens"]) == (["a", "b", "c", *tail], ["d", "e", *tail])
    assert first["token_logprobs"] == [None, -0.5, -0.5] + [-0.5] * max_tokens
    assert first["top_logprobs"][:2] == [None, {"b": -0.5}]
    assert first["text_offset"] == [0, 1, 2, 3][: 3 + max_tokens]


def test_an_echo_without_scores_repeats_the_prompt_to_the_letter(client: TestClient, engine: Any) -> None:
    body = complete(client, prompt="é<|bos|>", echo=True)
    assert body["choices"][0]["text"] == "é<|bos|>Hello"
    assert engine.commands[0].params.prompt_logprobs is None


def test_every_choice_of_a_scored_prompt_has_its_scores(client: TestClient) -> None:
    body = complete(client, prompt="ab", n=2, echo=True, logprobs=0, max_tokens=1)
    assert [choice["logprobs"]["tokens"] for choice in body["choices"]] == [["a", "b", "H"], ["a", "b", "e"]]
    assert [choice["logprobs"]["top_logprobs"][1] for choice in body["choices"]] == [{"b": -0.5}] * 2


def test_chat_logprobs_have_all_four_keys_and_true_bytes(client: TestClient, engine: Any) -> None:
    engine.script.text = "é"
    body = chat(client, logprobs=True, top_logprobs=2, max_tokens=2)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    first, second = logprobs["content"]
    assert (first["token"], first["bytes"], second["bytes"]) == ("\ufffd", [0xC3], [0xA9])
    assert set(first) == {"token", "logprob", "bytes", "top_logprobs"}
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -9999.0]
    assert set(first["top_logprobs"][0]) == {"token", "logprob", "bytes"}


def test_chat_logprobs_without_alternatives_are_empty_lists(client: TestClient) -> None:
    content = chat(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []


def test_a_stop_string_ends_the_choice_and_frees_it_in_the_engine(client: TestClient, engine: Any) -> None:
    body = complete(client, stop=["lo, w"], max_tokens=40, logprobs=0)
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("Hel", "stop")
    assert body["usage"]["completion_tokens"] == 8
    assert body["choices"][0]["logprobs"]["tokens"] == ["H", "e", "l"]
    assert engine.aborted_choices == [(engine.commands[0].request_id, 0)]


def test_the_stop_string_is_included_where_asked(client: TestClient) -> None:
    body = complete(client, stop="lo", max_tokens=40, include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "Hello"


def test_text_parts_are_joined_and_developer_is_system(client: TestClient, engine: Any, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(client, messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}])
    prompt = tokenizer.decode(engine.commands[0].prompt_ids)
    assert prompt == "<system>be<user>one\ntwo<assistant>"


@pytest.mark.parametrize("arguments", ['{"a": 1}', "not json", "3", "[" * 5000])
def test_calls_of_earlier_answers_are_history(client: TestClient, engine: Any, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    assert chat(client, messages=history)["choices"][0]["finish_reason"] == "length"


def test_fields_without_effect_are_accepted_and_unknown_ones_are_named(client: TestClient) -> None:
    silent = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "api_token": "secret",
        "adapter_source": "hub",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    answer = client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1} | silent)
    assert answer.status_code == 200
    assert "x-loraplex-ignored-params" not in answer.headers
    assert answer.json()["service_tier"] == "default"
    loud = {"spice": 1, "store": True, "bad\r\nname": 1, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1} | loud)
    assert answer.headers["x-loraplex-ignored-params"] == "spice, bad??name, store, stream_options"


def test_a_chat_stream_is_a_role_then_tokens_then_an_end(client: TestClient) -> None:
    chunks = stream_chat(client, max_tokens=3)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "e"},
        {"content": "l"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_the_last_chunk_of_a_completion_carries_the_finish_reason(client: TestClient) -> None:
    chunks = stream(client, "/v1/completions", {"prompt": "ab", "max_tokens": 3})
    assert [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ("H", None),
        ("e", None),
        ("l", "length"),
    ]


def test_usage_comes_in_a_chunk_without_choices_and_is_null_elsewhere(client: TestClient) -> None:
    *chunks, last = stream_chat(client, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (21, 5)
    assert set(last["metrics"]) >= {"queue_time_ms", "time_to_first_token_ms", "mean_itl_ms", "adapter_load_ms"}


def test_continuous_usage_counts_on_every_chunk(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, "/v1/completions", {"prompt": "ab", "max_tokens": 3, "stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == []


def test_streamed_choices_are_interleaved_and_join_to_the_whole_answers(client: TestClient) -> None:
    fields = {"n": 3, "max_tokens": 6, "stop": ["wor"], "logprobs": True}
    whole = [choice["message"]["content"] for choice in chat(client, **fields)["choices"]]
    choices = [chunk["choices"][0] for chunk in stream_chat(client, **fields)]
    texts = ["".join(c["delta"].get("content", "") for c in choices if c["index"] == index) for index in range(3)]
    assert texts == whole
    assert [choice["index"] for choice in choices[:6]] == [0, 0, 1, 1, 2, 2]


def test_a_stream_of_many_prompts_numbers_its_choices(client: TestClient) -> None:
    chunks = stream(client, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "echo": True})
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == at) for at in range(4)]
    assert texts == ["aHe", "ael", "bHe", "bel"]


def test_streamed_logprobs_are_those_of_the_whole_answer(client: TestClient) -> None:
    fields = {"prompt": "ab", "max_tokens": 9, "logprobs": 2, "echo": True, "stop": ["o w"]}
    whole = complete(client, **fields)["choices"][0]["logprobs"]
    chunks = stream(client, "/v1/completions", fields)
    for key in whole:
        assert [item for chunk in chunks for item in chunk["choices"][0]["logprobs"][key]] == whole[key]


def test_an_interval_sends_fewer_events(make_client: Any) -> None:
    chunks = stream(make_client(stream_interval=4), "/v1/completions", {"prompt": "ab", "max_tokens": 9})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["H", "ello", ", wo"]


def test_tokens_without_text_are_events_too(client: TestClient, engine: Any) -> None:
    engine.script.text = "😀"
    chunks = stream(client, "/v1/completions", {"prompt": "ab", "max_tokens": 4})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "", "", "😀"]


def test_the_exact_bytes_of_a_stream(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True})
    first = json.loads(answer.content.split(b"\n")[0].removeprefix(b"data: "))
    head = (
        f'"id":"{first["id"]}","object":"text_completion","created":{first["created"]},"model":"tiny",'
        f'"system_fingerprint":"{first["system_fingerprint"]}"'
    )
    choice = '{"index":0,"text":"H","logprobs":null,"finish_reason":"length"}'
    assert answer.content == f'data: {{{head},"choices":[{choice}]}}\n\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (ContextLengthError("too long", param="prompt"), 400, {}),
        (OverloadedError("full"), 429, {"retry-after": "1"}),
        (UnavailableError("starting"), 503, {"retry-after": "1"}),
        (EngineError("broke"), 500, {"x-should-retry": "false"}),
        (RuntimeError("secret"), 500, {"x-should-retry": "false"}),
    ],
)
def test_an_error_before_the_first_token_has_its_status(
    client: TestClient, engine: Any, error: Exception, status: int, headers: dict[str, str], streamed: bool
) -> None:
    engine.script.error = error
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": streamed})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in answer.text
    assert headers.items() <= dict(answer.headers).items()


def test_an_error_in_mid_stream_is_one_event_and_the_end(client: TestClient, engine: Any) -> None:
    engine.script.error, engine.script.error_after = EngineError("broke"), 2
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert answer.status_code == 200
    *_, last, rest = answer.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "broke"
    assert (rest, "[DONE]" in answer.text) == ("", False)


def test_one_failed_prompt_of_many_ends_them_all(client: TestClient, engine: Any) -> None:
    engine.script.error, engine.script.error_after = EngineError("broke"), 2
    answer = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert answer.status_code == 500
    assert set(engine.aborted) == {command.request_id for command in engine.commands}


def test_an_engine_that_ends_too_early_is_an_error_and_no_short_answer(client: TestClient, engine: Any) -> None:
    async def nothing(_command: Any) -> Any:
        return
        yield

    engine.generate = nothing
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_no_work_is_taken_while_the_engine_is_not_ready(client: TestClient, engine: Any) -> None:
    engine.state = "restarting"
    answer = client.post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "restarting" in answer.json()["error"]["message"]


def test_a_clients_request_id_comes_back_if_it_is_fit_for_it(client: TestClient) -> None:
    for sent, fit in [("my-id_1", True), ("a" * 129, False), ("with space", False), ("", False)]:
        answer = client.get("/v1/models", headers={"x-request-id": sent})
        assert (answer.headers["x-request-id"] == sent) is fit
        assert answer.headers["openai-processing-ms"].isdecimal()
    assert client.get("/nope").headers["x-request-id"].startswith("req_")


def test_keys_are_asked_for_where_there_are_some(make_client: Any) -> None:
    client = make_client(api_keys=frozenset({"k1", "k2"}))
    for header in ("", "Bearer", "Bearer wrong", "Basic k1", "k1"):
        answer = client.get("/v1/models", headers={"authorization": header})
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer k1", "bearer k2"):
        assert client.get("/v1/models", headers={"authorization": header}).status_code == 200
    for path in ("/health", "/livez", "/readyz", "/metrics", "/version", "/ping"):
        assert client.get(path).status_code == 200


def test_an_open_server_takes_any_key_and_an_empty_one(client: TestClient) -> None:
    for header in ("Bearer ", "Bearer EMPTY"):
        assert client.get("/v1/models", headers={"authorization": header}).status_code == 200


def test_models_are_the_base_and_its_adapters_page_by_page(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert (models["object"], models["has_more"]) == ("list", False)
    assert [(one["id"], one["parent"], one["root"]) for one in models["data"]] == [
        ("tiny", None, "/models/tiny"),
        ("blue", "tiny", "/adapters/blue"),
        ("red", "tiny", "/adapters/red"),
    ]
    assert all(one["object"] == "model" and one["max_model_len"] == 256 for one in models["data"])
    seen, after = [], None
    while True:
        page = client.get("/v1/models", params={"limit": 1} | ({"after": after} if after else {})).json()
        seen.append(page["data"][0]["id"])
        after = seen[-1]
        if not page["has_more"]:
            break
    assert seen == ["tiny", "blue", "red"]


def test_a_model_is_found_by_each_of_its_names(client: TestClient) -> None:
    for name in ("tiny", "red", "tiny:red"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    answer = client.get("/v1/models/none")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_models_are_listed_while_the_engine_starts(client: TestClient, engine: Any) -> None:
    engine.state = "starting"
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_a_long_text_is_tokenized_like_a_short_one(client: TestClient, engine: Any) -> None:
    engine.max_model_len, engine.num_pages = 100_000, 100_000
    complete(client, prompt="a" * 20_000)
    assert engine.commands[0].prompt_ids == [64] * 20_000
