"""Spans and log lines of requests, over an engine that answers as it is told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient
from structlog.testing import LogCapture

from loraplex.server.app import create_app
from loraplex.server.errors import AdapterInvalidError, EngineError
from loraplex.server.http_config import HttpConfig
from loraplex.server.messages import Generate, TokenOutput
from loraplex.server.otlp_export import RareWarnings, open_tracing
from loraplex.server.settings import SettingsError
from loraplex.server.span_times import AdapterLoad, AdapterUse, BeginTimes, EndTimes, FailTimes
from loraplex.server.tracing import MOST_PROMPTS, Tracing, make_tracing

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "a secret text"}], "max_tokens": 3}


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(engine: Any, registry: Any, tokenizer: Any, exported: InMemorySpanExporter) -> Iterator[TestClient]:
    """A client of an app whose spans are kept in memory."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))

    async def close(seconds: float) -> None:
        assert seconds > 0
        provider.shutdown()

    app = create_app(engine, registry, tokenizer, HttpConfig(model_name="tiny"), tracing=Tracing(provider, close))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def tell(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the engine tell times: ``tell(loads, preempted)``, in seconds after the request came to it."""
    plain = engine.generate

    def install(uses: Callable[[float], list[AdapterUse]], preempted: tuple[float, ...] = ()) -> None:
        async def generate(command: Generate) -> AsyncGenerator[TokenOutput, None]:
            arrived, first = time.monotonic(), True
            async for output in plain(command):
                await asyncio.sleep(0.01)
                now = time.monotonic()
                began = BeginTimes(arrived, arrived + 0.004, now, uses(arrived)) if first else None
                over = EndTimes(now, [arrived + at for at in preempted]) if output.finish_reason else None
                first = False
                fields = {name: getattr(output, name) for name in output.__struct_fields__}
                yield TokenOutput(**(fields | {"began": began, "over": over}))

        monkeypatch.setattr(engine, "generate", generate)

    return install


def by_name(exported: InMemorySpanExporter) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for span in exported.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def one_adapter(arrived: float) -> list[AdapterUse]:
    loads = [
        AdapterLoad("remote", "disk", arrived - 1.0, arrived + 0.001, 4096),
        AdapterLoad("disk", "host", arrived + 0.001, arrived + 0.003, 4096),
        AdapterLoad("host", "pool", arrived + 0.004, None, 4096),
    ]
    return [AdapterUse("red", "0123456789abcdef", "dora", loads)]


def test_the_engines_times_become_spans(traced: TestClient, exported: Any, tell: Any) -> None:
    tell(one_adapter, preempted=(0.005, 0.025))
    assert traced.post("/v1/chat/completions", json=BODY | {"adapter_id": "red"}).status_code == 200
    spans = by_name(exported)
    [server], [queue], [prefill], [decode] = (
        spans[name] for name in ("POST /v1/chat/completions", "queue", "prefill", "decode")
    )
    remote, disk, host = spans["adapter_load"]
    assert {span.parent.span_id for name in spans for span in spans[name] if span is not server} == {
        server.context.span_id
    }
    assert queue.end_time - queue.start_time == pytest.approx(4e6, abs=1e3)
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == host.end_time == decode.start_time
    assert remote.start_time == queue.start_time, "what others have begun counts from the request's arrival on"
    assert remote.attributes["loraplex.adapter.load.seconds"] == pytest.approx(1.001)
    ways = [
        (one.attributes["loraplex.adapter.load.source"], one.attributes["loraplex.adapter.load.target"])
        for one in (remote, disk, host)
    ]
    assert ways == [("remote", "disk"), ("disk", "host"), ("host", "pool")]
    assert [event.name for event in prefill.events] == ["preempted"]
    assert [event.name for event in decode.events] == ["first_token", "preempted"]
    assert server.attributes["loraplex.adapter.kind"] == "dora"
    assert server.attributes["loraplex.adapter.identity"] == "0123456789ab"
    assert "secret" not in str([span.to_json() for name in spans for span in spans[name]])


def test_a_mix_names_its_adapters_and_weights(traced: TestClient, exported: Any) -> None:
    mix = {"adapters": [{"id": "red", "weight": 0.5}, {"id": "blue", "weight": 0.25}]}
    assert traced.post("/v1/chat/completions", json=BODY | {"adapter_id": mix}).status_code == 200
    [server] = by_name(exported)["POST /v1/chat/completions"]
    assert server.attributes["loraplex.adapter.ids"] == ("red", "blue")
    assert server.attributes["loraplex.adapter.weights"] == (0.5, 0.25)


def test_many_prompts_do_not_make_ever_more_spans(traced: TestClient, exported: Any, tell: Any) -> None:
    tell(lambda arrived: [])
    asked = {"prompt": ["x"] * (MOST_PROMPTS + 9), "max_tokens": 1}
    assert traced.post("/v1/completions", json=asked).status_code == 200
    spans = by_name(exported)
    assert len(spans["queue"]) == len(spans["decode"]) == MOST_PROMPTS
    assert spans["POST /v1/completions"][0].attributes["loraplex.prompt.count"] == MOST_PROMPTS + 9


def test_a_load_that_failed_is_the_span_that_failed(traced: TestClient, exported: Any, engine: Any) -> None:
    error = AdapterInvalidError("Adapter 'red': no such tensor")
    now = time.monotonic()
    error.times = FailTimes(now, now + 0.02, "red", now + 0.001)
    engine.script.error = error
    assert traced.post("/v1/chat/completions", json=BODY | {"adapter_id": "red"}).status_code == 400
    spans = by_name(exported)
    [load], [queue] = spans["adapter_load"], spans["queue"]
    assert load.attributes["loraplex.adapter.id"] == "red"
    assert load.attributes["error.type"] == "invalid_request_error"
    assert not load.status.is_ok
    assert not queue.status.is_ok


def test_a_stream_that_fails_marks_the_server_span(traced: TestClient, exported: Any, engine: Any, tell: Any) -> None:
    engine.script.error, engine.script.error_after = EngineError("The engine failed."), 2
    tell(lambda arrived: [])
    with traced.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert "server_error" in answer.read().decode()
    spans = by_name(exported)
    [server], [decode] = spans["POST /v1/chat/completions"], spans["decode"]
    assert not server.status.is_ok
    assert server.attributes["error.type"] == "server_error"
    assert decode.attributes["loraplex.outcome"] == "failed"


def test_a_request_that_ends_before_the_engine_speaks_has_waited(
    traced: TestClient, exported: Any, engine: Any
) -> None:
    engine.script.error = EngineError("The engine process died.")
    assert traced.post("/v1/chat/completions", json=BODY).status_code == 500
    assert set(by_name(exported)) == {"POST /v1/chat/completions", "wait"}


def test_without_tracing_the_clients_own_trace_is_passed_on(client: TestClient) -> None:
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert client.get("/v1/models", headers={"traceparent": sent}).headers["traceparent"] == sent
    assert "traceparent" not in client.get("/v1/models").headers
    assert "traceparent" not in client.get("/v1/models", headers={"traceparent": "00-nonsense"}).headers


def test_nothing_is_traced_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert make_tracing(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert make_tracing(None) is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert make_tracing(None) is None


def test_what_sends_spans_is_imported_by_nobody_who_does_not_ask() -> None:
    server = Path(__file__).resolve().parents[2] / "server"
    heavy = ("from opentelemetry.sdk", "from opentelemetry.exporter", "from loraplex.server.otlp_export")
    found = {path.name for path in server.glob("*.py") if any(text in path.read_text() for text in heavy)}
    assert found == {"otlp_export.py"}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(target: str) -> Any:
        raise ModuleNotFoundError(f"no {target}", name="opentelemetry.sdk")

    monkeypatch.setattr("loraplex.server.tracing.load", missing)
    with pytest.raises(SettingsError, match=r"loraplex\[otel\]"):
        make_tracing("http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert make_tracing(None) is None


async def test_a_dead_collector_costs_a_warning_and_no_time(caplog: pytest.LogCaptureFixture) -> None:
    tracing = open_tracing("http://127.0.0.1:9")
    tracer = tracing.provider.get_tracer("test")
    started = time.monotonic()
    for _ in range(5000):
        tracer.start_span("lost").end()
    assert time.monotonic() - started < 2
    await tracing.close(0.3)
    assert time.monotonic() - started < 3
    lost = [record for record in caplog.records if "traces cannot be sent" in record.getMessage()]
    assert len(lost) == 1
    assert lost[0].levelno == logging.WARNING


def test_a_warning_tells_how_many_were_withheld() -> None:
    rare = RareWarnings(seconds=0.05)
    records = [logging.LogRecord("x", logging.ERROR, "", 0, "no %s", ("answer",), None) for _ in range(4)]
    assert [rare.filter(record) for record in records[:3]] == [True, False, False]
    time.sleep(0.06)
    assert rare.filter(records[3])
    assert records[3].getMessage() == "traces cannot be sent: no answer (2 more)"


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """What is logged meanwhile, with what the context adds."""
    capture = LogCapture()
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture.entries
    structlog.configure(processors=before)


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    """With the access log, which other tests do without."""
    with make_client(access_log=True) as client:
        yield client


def test_every_request_has_one_line(client: TestClient, logged: list[Any]) -> None:
    client.post("/v1/chat/completions", json=BODY | {"adapter_id": "red"}, headers={"x-request-id": "mine"})
    client.post("/v1/chat/completions", json=BODY | {"adapter_id": "nobody"})
    client.get("/health")
    answered, refused, probe = [line for line in logged if line["event"] == "request"]
    assert (answered["request_id"], answered["adapter"], answered["completion_tokens"]) == ("mine", "red", 3)
    assert (refused["status"], refused["error_type"]) == (404, "not_found_error")
    assert "adapter" not in refused
    assert (answered["log_level"], refused["log_level"], probe["log_level"]) == ("info", "info", "debug")
    assert "secret" not in str(logged)


def test_the_lines_of_a_stream_carry_its_ids(client: TestClient, engine: Any, logged: list[Any]) -> None:
    engine.script.error, engine.script.error_after = RuntimeError("oops"), 1
    sent = {"x-request-id": "streamed", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True, "model": "red"}, headers=sent) as a:
        a.read()
    failures = [line for line in logged if line["event"] == "stream_failed"]
    assert [(line["request_id"], line["adapter"], line["trace_id"]) for line in failures] == [
        ("streamed", "red", "0af7651916cd43dd8448eb211c80319c")
    ]
    assert [line["event"] for line in logged] == ["stream_failed", "request"]


def test_an_uncaught_error_is_logged_once_with_the_requests_id(
    client: TestClient, engine: Any, logged: list[Any]
) -> None:
    engine.script.error = RuntimeError("oops")
    assert client.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "broken"}).status_code == 500
    [failure] = [line for line in logged if "oops" in str(line)]
    assert (failure["request_id"], failure["log_level"]) == ("broken", "error")


def test_the_access_log_can_be_switched_off(make_client: Callable[..., TestClient], logged: list[Any]) -> None:
    with make_client(access_log=False) as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert not [line for line in logged if line["event"] == "request"]


def test_calls_about_adapters_name_them(client: TestClient, logged: list[Any]) -> None:
    assert client.post("/v1/adapters/red/prefetch", json={"tier": "host"}).status_code == 200
    assert client.delete("/v1/adapters/blue").status_code == 200
    assert [(line["method"], line["adapter"]) for line in logged] == [("POST", "red"), ("DELETE", "blue")]


def test_the_engine_is_told_what_logs_call_a_request(client: TestClient, engine: Any) -> None:
    client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1}, headers={"x-request-id": "mine"})
    assert [command.origin for command in engine.commands] == ["mine", "mine"]
