"""Traces of a real server, as a collector gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest

TRACE = "4bf92f3577b34da6a3ce929d0e0e{:04x}"
CALLER = "00f067aa0ba902b7"
QUESTION = "kernelpanic"
CLOCKS = 0.005
"""Seconds by which the clocks of spans may differ."""


def traceparent(number: int, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE.format(number)}-{CALLER}-{flags}"}


def body(adapter: str | None, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"messages": messages, "adapter_id": adapter, "max_tokens": 6, "ignore_eos": True, **options}


def children(spans: list[Any], name: str) -> list[Any]:
    return [span for span in spans if span.name == name]


def test_a_request_is_a_tree_of_spans_below_its_callers(observed: Any, spans_of: Any) -> None:
    with observed.openai() as client:
        raw = client.chat.completions.with_raw_response.create(
            model="caesar",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=6,
            extra_body={"ignore_eos": True},
            extra_headers=traceparent(1),
        )
    answer = raw.parse()
    server, *rest = spans_of(TRACE.format(1))
    assert raw.headers["traceparent"] == f"00-{server.trace_id}-{server.id}-01"
    assert (server.name, server.service, server.parent) == ("POST /v1/chat/completions", "observed", CALLER)
    assert {span.parent for span in rest} == {server.id}
    assert [span.name for span in rest if span.name != "adapter_load"] == ["queue", "prefill", "decode"]
    assert all(server.start - CLOCKS <= span.start <= span.end <= server.end + CLOCKS for span in rest)
    [queue], [prefill], [decode] = (children(rest, name) for name in ("queue", "prefill", "decode"))
    assert queue.end == pytest.approx(prefill.start, abs=1e-6)
    assert prefill.end == pytest.approx(decode.start, abs=1e-6)
    assert queue.seconds + prefill.seconds + decode.seconds >= server.seconds / 2
    assert decode.events["first_token"] == pytest.approx(decode.start, abs=1e-6)
    ways = [
        (one.attributes["loraplex.adapter.load.source"], one.attributes["loraplex.adapter.load.target"])
        for one in children(rest, "adapter_load")
    ]
    assert ways == [("disk", "host"), ("host", "pool")]
    first, second = children(rest, "adapter_load")
    assert queue.start - CLOCKS <= first.start <= first.end <= queue.end + CLOCKS
    assert first.attributes["loraplex.adapter.load.bytes"] == second.attributes["loraplex.adapter.load.bytes"] > 1000
    said = server.attributes
    assert said["http.response.status_code"] == 200
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == said["loraplex.adapter.id"] == "caesar"
    assert said["loraplex.adapter.kind"] == "lora"
    assert said["loraplex.adapter.identity"] == first.attributes["loraplex.adapter.identity"] != ""
    assert said["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
    assert said["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens == 6
    assert said["gen_ai.response.finish_reasons"] == ["length"]
    assert said["gen_ai.response.id"] == answer.id
    assert not server.is_error


def test_the_span_of_a_stream_ends_with_the_stream(observed: Any, spans_of: Any) -> None:
    with observed.openai() as client:
        stream = client.chat.completions.create(
            model="loraplex-demo",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=6,
            stream=True,
            n=2,
            extra_body={"ignore_eos": True},
            extra_headers=traceparent(2),
        )
        assert "traceparent" in stream.response.headers
        assert len(list(stream)) > 6
    server, *rest = spans_of(TRACE.format(2))
    assert [span.name for span in rest] == ["queue", "prefill", "decode"]
    assert server.end + CLOCKS >= rest[-1].end
    assert server.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert server.attributes["gen_ai.request.stream"] is True
    assert server.attributes["gen_ai.usage.output_tokens"] == 12


def test_each_prompt_of_a_batch_has_its_spans(observed: Any, spans_of: Any) -> None:
    asked = {"prompt": ["one", "two", "three"], "max_tokens": 4, "ignore_eos": True, "adapter_id": "upper"}
    assert observed.request("POST", "/v1/completions", json=asked, headers=traceparent(3)).status_code == 200
    _, *rest = spans_of(TRACE.format(3))
    for name in ("queue", "prefill", "decode"):
        found = sorted(span.attributes["loraplex.prompt.index"] for span in children(rest, name))
        assert found == [0, 1, 2]


def test_what_the_caller_does_not_sample_is_not_traced(observed: Any, collector: Any, spans_of: Any) -> None:
    answer = observed.request("POST", "/v1/chat/completions", json=body(None), headers=traceparent(4, "00"))
    assert answer.headers["traceparent"].startswith(f"00-{TRACE.format(4)}-")
    assert answer.headers["traceparent"].endswith("-00")
    assert observed.request("GET", "/v1/models?limit=1&api_key=hush", headers=traceparent(5)).status_code == 200
    [models] = spans_of(TRACE.format(5))
    assert models.attributes["url.query"] == "REDACTED"
    assert not collector.of_trace(TRACE.format(4))


def test_probes_and_scrapes_are_not_traced(observed: Any, collector: Any, wait_until: Callable[..., bool]) -> None:
    for path in ("/health", "/metrics", "/livez"):
        observed.request("GET", path, headers=traceparent(6))
    observed.request("GET", "/v1/models", headers=traceparent(7))
    assert wait_until(lambda: collector.of_trace(TRACE.format(7)))
    assert not collector.of_trace(TRACE.format(6))


def test_a_refused_request_says_why(observed: Any, spans_of: Any) -> None:
    answer = observed.request("POST", "/v1/chat/completions", json=body("nobody"), headers=traceparent(8))
    assert answer.status_code == 404
    [server] = spans_of(TRACE.format(8))
    assert server.attributes["error.type"] == answer.json()["error"]["type"]
    assert not server.is_error, "what is the client's fault is no error of the server"


def test_a_client_that_goes_away_ends_its_spans(observed: Any, spans_of: Any) -> None:
    with observed.openai() as client:
        stream = client.chat.completions.create(
            model="loraplex-demo",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers=traceparent(9),
        )
        next(stream)
        stream.close()
    server, *rest = spans_of(TRACE.format(9))
    assert server.is_error
    assert server.attributes["loraplex.outcome"] == "aborted"
    assert rest[-1].name == "decode"
    assert rest[-1].attributes["loraplex.outcome"] == "aborted"


def test_no_span_holds_a_text_or_a_key(observed: Any, collector: Any, spans_of: Any) -> None:
    observed.request("POST", "/v1/chat/completions", json=body("upper"), headers=traceparent(10))
    spans_of(TRACE.format(10))
    sent = b"".join(collector.bodies)
    for secret in (QUESTION, QUESTION.upper(), observed.key, "hush"):
        assert secret.encode() not in sent


def test_our_client_takes_a_traceparent(observed: Any, spans_of: Any) -> None:
    with observed.client(headers=traceparent(13)) as client:
        assert client.chat([{"role": "user", "content": QUESTION}], adapter_id="upper").text
    assert spans_of(TRACE.format(13))[0].parent == CALLER


def test_a_body_that_is_no_json_is_traced(observed: Any, spans_of: Any) -> None:
    answer = httpx2.post(
        observed.url + "/v1/completions",
        content=b"{",
        headers={"authorization": f"Bearer {observed.key}", **traceparent(14)},
        verify=False,
    )
    assert answer.status_code == 400
    assert spans_of(TRACE.format(14))[0].attributes["http.response.status_code"] == 400
