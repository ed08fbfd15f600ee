from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from loraplex.clients.client import Client
from loraplex.clients.errors import InvalidConfiguration, LoraplexClientError, UnexpectedResponse
from loraplex.clients.types import Choice, RouterRun, Usage

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "red",
    "choices": [
        {"index": 1, "text": "one", "finish_reason": "length", "logprobs": None},
        {"index": 0, "text": "zero", "finish_reason": "stop", "logprobs": {"tokens": ["zero"]}},
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
}
CHAT = COMPLETION | {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}]
}
ADAPTER = {
    "id": "red",
    "object": "adapter",
    "path": "/adapters/red",
    "parent": "base",
    "tier": "host",
    "rank": 8,
    "kind": "mixlora",
    "num_experts": 8,
    "targets": ["q_proj"],
    "pages": 2,
    "warnings": ["odd"],
    "state": "failed",
    "error": {"message": "gone", "param": None, "code": None},
    "source": "s3",
    "pinned": True,
    "tags": ["new"],
}


def test_generate_sends_what_was_asked_and_nothing_else(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=COMPLETION))
    lora.generate("Hi", adapter_id="red", max_tokens=4, temperature=0.0, top_p=None, stop=("a", "b"), n=2, echo=True)
    [heard] = server.received
    assert (heard.method, heard.path) == ("POST", "/v1/completions")
    assert heard.body == {
        "prompt": "Hi",
        "adapter_id": "red",
        "max_tokens": 4,
        "temperature": 0.0,
        "stop": ["a", "b"],
        "n": 2,
        "echo": True,
    }


def test_every_option_becomes_a_field_of_its_name(server: Any, reply: Any, lora: Any) -> None:
    options: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "stop": "x",
        "seed": 7,
        "n": 1,
        "logprobs": 2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 1,
        "cache_salt": "tenant",
    }
    server.say(reply(body=COMPLETION))
    lora.generate([1, 2], logit_bias={5: -1.0}, extra={"user": "me", "seed": 8}, **options)
    assert server.received[0].body == options | {"prompt": [1, 2], "logit_bias": {"5": -1.0}, "user": "me", "seed": 8}


@pytest.mark.parametrize("mix", [{"red": 0.7, "blue": -1}, [("red", 0.7), ("blue", -1)]])
def test_a_mix_is_a_mapping_or_pairs_of_adapters_and_weights(server: Any, reply: Any, lora: Any, mix: Any) -> None:
    server.say(reply(body=COMPLETION), reply(body=CHAT))
    lora.generate("Hi", adapter_id=mix)
    lora.chat([], adapter_id=mix)
    parts = [{"id": "red", "weight": 0.7}, {"id": "blue", "weight": -1}]
    assert [heard.body["adapter_id"] for heard in server.received] == [{"adapters": parts}] * 2


def test_routing_is_told_where_it_is_asked_for(server: Any, reply: Any, lora: Any) -> None:
    runs = [
        {"adapter": "red", "layer": 3, "site": "mlp", "start": 0, "experts": [[1, 0]], "weights": [[0.75, 0.25]]},
        {"adapter": "red", "layer": None, "site": "token", "start": 2, "experts": [[5]], "weights": [[1.0]]},
    ]
    choice = CHAT["choices"][0] | {"routing": runs}  # type: ignore[index]
    server.say(reply(body=CHAT | {"choices": [choice]}), reply(body=CHAT))
    answer = lora.chat([], adapter_id="red", return_routing=True)
    assert server.received[0].body == {"messages": [], "adapter_id": "red", "return_routing": True}
    assert answer.routing == answer.choices[0].routing
    assert answer.routing == (
        RouterRun("red", 3, "mlp", 0, ((1, 0),), ((0.75, 0.25),)),
        RouterRun("red", None, "token", 2, ((5,),), ((1.0,),)),
    )
    assert lora.chat([]).routing == ()


def test_an_unknown_option_is_refused_by_name(lora: Any, server: Any) -> None:
    with pytest.raises(TypeError, match=r"'max_token'.*max_tokens"):
        lora.generate("Hi", max_token=3)
    with pytest.raises(TypeError, match="'echo'"):
        lora.chat([], echo=True)
    assert server.received == []


def test_generate_returns_all_choices_in_order(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=COMPLETION, headers={"x-request-id": "req-9"}))
    answer = lora.generate("Hi")
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("zero", "stop", {"tokens": ["zero"]})
    assert answer.choices[1] == Choice(1, "one", "length")
    assert answer.usage == Usage(3, 2, 1)
    assert answer.usage.total_tokens == 5
    assert (answer.id, answer.model, answer.request_id) == ("cmpl-1", "red", "req-9")
    assert answer.raw == COMPLETION


def test_chat_asks_for_logprobs_as_chats_do(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=CHAT))
    answer = lora.chat([{"role": "user", "content": "Hi"}], adapter_id="red", logprobs=0)
    assert answer.text == "hello"
    assert server.received[0].path == "/v1/chat/completions"
    assert server.received[0].body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "adapter_id": "red",
        "logprobs": True,
        "top_logprobs": 0,
    }


def test_a_message_without_content_is_an_empty_text(server: Any, reply: Any, lora: Any) -> None:
    message = {"role": "assistant", "content": None}
    server.say(reply(body=CHAT | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
    assert lora.chat([]).text == ""


def test_loading_an_adapter_returns_it(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=ADAPTER))
    adapter = lora.load_adapter("red", "/adapters/red", replace=True, tags=("a", "b"), pinned=None)
    assert (adapter.name, adapter.tier, adapter.rank, adapter.targets, adapter.pages) == (
        "red",
        "host",
        8,
        ("q_proj",),
        2,
    )
    assert (adapter.kind, adapter.num_experts, adapter.warnings) == ("mixlora", 8, ("odd",))
    assert (adapter.state, adapter.error, adapter.source) == ("failed", "gone", "s3")
    assert (adapter.pinned, adapter.tags) == (True, ("new",))
    [heard] = server.received
    assert (heard.method, heard.path) == ("POST", "/v1/adapters")
    assert heard.body == {"id": "red", "path": "/adapters/red", "replace": True, "tags": ["a", "b"]}


def test_an_adapter_is_pinned_prefetched_and_changed_by_name(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body=ADAPTER))
    lora.pin_adapter("a b")
    lora.unpin_adapter("red")
    lora.prefetch_adapter("red")
    lora.prefetch_adapter("red", "host")
    lora.change_adapter("red", path=Path("/other"), pinned=False, tags=[])
    assert [(one.method, one.path, one.body) for one in server.received] == [
        ("POST", "/v1/adapters/a%20b/pin", None),
        ("POST", "/v1/adapters/red/unpin", None),
        ("POST", "/v1/adapters/red/prefetch", {"tier": "pool"}),
        ("POST", "/v1/adapters/red/prefetch", {"tier": "host"}),
        ("PATCH", "/v1/adapters/red", {"path": "/other", "pinned": False, "tags": []}),
    ]


def test_files_of_an_upload_are_told_to_be_kept(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body={"deleted": True}))
    lora.unload_adapter("red", delete_files=False)
    lora.unload_adapter("red")
    assert [(one.method, one.query) for one in server.received] == [("DELETE", "delete_files=false"), ("DELETE", "")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def test_an_upload_sends_the_folder_as_a_form(server: Any, reply: Any, lora: Any, folder: Path) -> None:
    server.say(reply(body=ADAPTER))
    assert lora.upload_adapter("red", folder, tags=["a", "b"], pinned=True).name == "red"
    [heard] = server.received
    assert heard.headers["content-type"].startswith("multipart/form-data; boundary=")
    for part in (b'name="id"\r\n\r\nred\r\n', b'name="tags"\r\n\r\na,b\r\n', b'name="pinned"\r\n\r\ntrue\r\n'):
        assert part in heard.body
    assert b"content of adapter_config.json" in heard.body
    assert b"content of adapter_model.safetensors" in heard.body
    assert b"adapter_model.bin" not in heard.body
    assert b"README" not in heard.body


def test_an_upload_is_sent_whole_again_once_the_server_is_ready(
    server: Any, reply: Any, lora: Any, folder: Path
) -> None:
    server.say(reply(status=503, body={"error": {"message": "starting"}}), reply(body=ADAPTER))
    lora.upload_adapter("red", folder)
    assert [one.body.count(b"content of adapter") for one in server.received] == [2, 2]


def test_an_archive_is_sent_as_it_is(server: Any, reply: Any, lora: Any, tmp_path: Path) -> None:
    (tmp_path / "red.tar.gz").write_bytes(b"packed")
    server.say(reply(body=ADAPTER))
    lora.upload_adapter("red", tmp_path / "red.tar.gz", replace=True)
    assert b'name="file"; filename="red.tar.gz"' in server.received[0].body


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_what_is_no_adapter_is_not_sent(server: Any, lora: Any, folder: Path, missing: str) -> None:
    (folder / "adapter_model.bin").unlink()
    path = folder / missing
    if missing:
        path.unlink()
    with pytest.raises(InvalidConfiguration, match="accepted is a folder with adapter_config") as caught:
        lora.upload_adapter("red", folder if missing else folder / "none")
    assert caught.value.param == "path"
    assert server.received == []


def test_an_adapter_option_that_there_is_not_is_refused_by_name(lora: Any, server: Any, folder: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: lora.load_adapter("red", "/x", pined=True),
        lambda: lora.upload_adapter("red", folder, pined=True),
        lambda: lora.change_adapter("red", pined=True),
        lambda: list(lora.list_adapters(pined=True)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="'pined'"):
            call()
    assert server.received == []


def test_lists_of_adapters_are_asked_for_by_what_they_are(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body={"data": [ADAPTER], "has_more": True}), reply(body={"data": [], "has_more": False}))
    assert len(list(lora.list_adapters(prefix="re", state="ready", tier=None, tag="x", pinned=True))) == 1
    first, second = (parse_qs(one.query) for one in server.received)
    assert first == {"limit": ["1000"], "prefix": ["re"], "state": ["ready"], "tag": ["x"], "pinned": ["true"]}
    assert second == first | {"after": ["red"]}


@pytest.mark.parametrize(("name", "path"), [("a b", "a%20b"), ("a/b?c#d", "a%2Fb%3Fc%23d"), ("50%", "50%25")])
def test_names_are_quoted_in_paths(server: Any, reply: Any, lora: Any, name: str, path: str) -> None:
    server.say(reply(body={}))
    lora.unload_adapter(name)
    assert (server.received[0].method, server.received[0].path) == ("DELETE", f"/v1/adapters/{path}")


def test_adapters_are_listed_over_all_pages(server: Any, reply: Any, lora: Any) -> None:
    first = {"data": [ADAPTER, ADAPTER | {"id": "blue & co"}], "has_more": True}
    server.say(reply(body=first), reply(body={"data": [ADAPTER | {"id": "green"}], "has_more": False}))
    assert [adapter.name for adapter in lora.list_adapters()] == ["red", "blue & co", "green"]
    assert [heard.query for heard in server.received] == ["limit=1000", "limit=1000&after=blue+%26+co"]


def test_a_page_that_is_empty_but_promises_more_ends_the_list(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body={"data": [], "has_more": True}))
    assert list(lora.list_adapters()) == []


def test_models_names_the_base_and_the_adapters(server: Any, reply: Any, lora: Any) -> None:
    base = {"id": "base", "created": 5, "root": "/models/base", "parent": None, "max_model_len": 64}
    red = {"id": "red", "created": 6, "parent": "base", "kind": "mixlora", "num_experts": 8}
    server.say(reply(body={"data": [base, red]}))
    models = lora.models()
    assert [(model.id, model.parent, model.max_model_len) for model in models] == [
        ("base", None, 64),
        ("red", "base", None),
    ]
    assert [(model.kind, model.num_experts) for model in models] == [(None, None), ("mixlora", 8)]


def test_version_is_a_text(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(body={"version": "0.1.0"}))
    assert lora.version() == "0.1.0"


def test_health_is_false_while_the_server_is_not_ready_and_is_not_retried(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(status=503), reply(body={"status": "ok"}))
    assert lora.health() is False
    assert lora.health() is True
    assert len(server.received) == 2


def test_health_is_false_where_nobody_listens(make_client: Callable[..., Any]) -> None:
    assert make_client("http://127.0.0.1:9").health() is False


@pytest.mark.parametrize("body", ["<html>hello</html>", [], {}, {"choices": [], "id": "", "model": ""}, {"choices": 3}])
def test_an_answer_of_another_shape_is_unexpected(server: Any, reply: Any, lora: Any, body: Any) -> None:
    server.say(reply(body=body))
    with pytest.raises(UnexpectedResponse, match="is there a Loraplex server at that URL") as caught:
        lora.generate("Hi")
    assert caught.value.status == 200


def test_a_redirect_is_unexpected(server: Any, reply: Any, lora: Any) -> None:
    server.say(reply(status=307, headers={"location": "http://elsewhere.test/"}))
    with pytest.raises(UnexpectedResponse):
        lora.generate("Hi")


def test_the_key_goes_as_a_bearer_token(server: Any, reply: Any, make_client: Callable[..., Any]) -> None:
    server.say(reply(body={"version": "1"}))
    make_client(api_key=" secret\n").version()
    make_client().version()
    assert [heard.headers.get("authorization") for heard in server.received] == ["Bearer secret", None]


def test_the_key_comes_from_the_environment(
    server: Any, reply: Any, make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "of-the-environment")
    server.say(reply(body={"version": "1"}))
    make_client().version()
    make_client(api_key="own").version()
    assert [heard.headers["authorization"] for heard in server.received] == ["Bearer of-the-environment", "Bearer own"]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_as_openai_clients_want_it(
    server: Any, reply: Any, make_client: Callable[..., Any], ending: str
) -> None:
    server.say(reply(body={"version": "1"}))
    make_client(f"{server.url}/proxied{ending}").version()
    assert server.received[0].path == "/proxied/version"


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host:port"}, "base_url"),
        ({"base_url": ""}, "base_url"),
        ({"api_key": "schlüssel"}, "api_key"),
        ({"api_key": "two\nlines"}, "api_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"{param}.* accepted ") as caught:
        Client(**arguments)
    assert caught.value.param == param
    assert isinstance(caught.value, LoraplexClientError)
    assert isinstance(caught.value, ValueError)


def test_headers_go_with_every_call_but_never_in_place_of_the_key(server: Any, reply: Any) -> None:
    server.say(reply(body=COMPLETION))
    sent = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "Authorization": "mine"}
    with Client(server.url, api_key="sk-1", headers=sent) as client:
        client.generate("Hi")
    [heard] = server.received
    assert heard.headers["traceparent"] == sent["traceparent"]
    assert heard.headers["authorization"] == "Bearer sk-1"
    with pytest.raises(InvalidConfiguration, match="header 'x' cannot be sent"):
        Client(server.url, headers={"x": "a\nb"})
