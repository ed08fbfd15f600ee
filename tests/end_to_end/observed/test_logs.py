"""The JSON log of a real server: both of its processes write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

QUESTION = "wordsnobodymayread"
SIGNED = "https://bucket.s3.amazonaws.com/adapter?X-Amz-Signature=0123456789abcdef&X-Amz-Credential=AKIAHUSH"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def ask(observed: Any) -> Callable[..., Any]:
    """Asks one question under a request id."""

    def post(request_id: str, **options: Any) -> Any:
        asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 5, "ignore_eos": True, **options}
        headers = {"x-request-id": request_id, "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        return observed.request("POST", "/v1/chat/completions", json=asked, headers=headers)

    return post


@pytest.fixture
def told(observed: Any, lines_of: Any, wait_until: Callable[..., bool]) -> Callable[..., list[dict[str, Any]]]:
    """The lines of one request, once its access line is there and ``count`` lines of the engine."""

    def find(request_id: str, count: int) -> list[dict[str, Any]]:
        def own() -> list[dict[str, Any]]:
            return [line for line in lines_of(observed) if line.get("request_id") == request_id]

        def is_whole() -> bool:
            lines = own()
            has_access = any(line["event"] == "request" for line in lines)
            return has_access and sum(line["process"] == "engine" for line in lines) >= count

        assert wait_until(is_whole), own()
        return own()

    return find


def test_a_request_can_be_followed_through_both_processes(ask: Any, told: Any) -> None:
    assert ask("follow-me", adapter_id="reverse").status_code == 200
    lines = told("follow-me", 4)
    assert [line["event"] for line in lines if line["process"] == "engine"] == [
        "a request came",
        "a request waits",
        "a request has its first token",
        "a choice is over",
    ]
    assert all(line["adapter"] == "reverse" for line in lines if line["event"] != "ignored_fields")
    assert {"timestamp", "level", "logger", "event", "process"} <= set(lines[0])


def test_the_access_line_says_how_it_went(observed: Any, ask: Any, told: Any) -> None:
    usage = ask("how-did-it-go", adapter_id="upper").json()["usage"]
    [line] = [line for line in told("how-did-it-go", 3) if line["event"] == "request"]
    assert (line["level"], line["process"]) == ("info", "http")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"] == 5
    assert (line["outcome"], line["finish_reason"]) == ("finished", "length")
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["ms"]
    assert line["adapter_load_ms"] >= 0
    assert len(line["adapter_identity"]) == 12
    assert line["trace_id"] == TRACE
    assert len(line["span_id"]) == 16


def test_a_stream_has_one_line_at_its_end(ask: Any, told: Any) -> None:
    assert ask("stream-me", stream=True, adapter_id="upper").text.endswith("[DONE]\n\n")
    lines = [line for line in told("stream-me", 3) if line["process"] == "http"]
    assert [(line["event"], line["stream"], line["completion_tokens"]) for line in lines] == [("request", True, 5)]


def test_loads_are_told_with_the_adapters_identity(observed: Any, ask: Any, told: Any, lines_of: Any) -> None:
    assert ask("load-it", adapter_id="sort").status_code == 200
    [access] = [line for line in told("load-it", 4) if line["event"] == "request"]
    loads = [line for line in lines_of(observed) if line["event"] == "an adapter was loaded"]
    [load] = [line for line in loads if line["adapter"] == "sort"]
    assert load["adapter_identity"] == access["adapter_identity"]
    assert (load["process"], load["level"]) == ("engine", "debug")


def test_probes_are_told_at_debug_alone(observed: Any, lines_of: Any, wait_until: Callable[..., bool]) -> None:
    assert observed.get("/metrics").status_code == 200
    assert wait_until(lambda: any(line.get("path") == "/metrics" for line in lines_of(observed)))
    levels = {line["level"] for line in lines_of(observed) if line.get("path") in {"/health", "/metrics"}}
    assert levels == {"debug"}


def test_nothing_secret_is_logged(observed: Any, ask: Any, told: Any) -> None:
    assert ask("keep-it", adapter_id="upper").status_code == 200
    assert observed.post("/v1/load_lora_adapter", {"lora_name": "signed", "lora_path": SIGNED}).status_code == 400
    assert observed.request("GET", "/v1/models?api_key=hushhush").status_code == 200
    assert observed.request("GET", "/v1/models", headers={"authorization": "Bearer sk-wrong"}).status_code == 401
    ask("keep-it-2")
    told("keep-it-2", 3)
    for secret in (QUESTION, QUESTION.upper(), observed.key, "0123456789abcdef", "AKIAHUSH", "hushhush", "sk-wrong"):
        assert secret not in observed.log
