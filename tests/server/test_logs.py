"""What gets into the log, and what does not."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from loraplex.server.engine_log import RequestLog
from loraplex.server.logs import configure_logs, without_secrets
from loraplex.server.messages import AdapterRef, ErrorInfo, Generate, RequestFailed, SamplingParams, TokenOutput
from loraplex.server.span_times import AdapterUse, BeginTimes, EndTimes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Configures logs as a process does, and gives what they write."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level

    def configure(**options: Any) -> io.StringIO:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        configure_logs(**options)
        return stream

    yield configure
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("GET https://b.s3.amazonaws.com/a?X-Amz-Signature=12ab failed", "GET https://b.s3.amazonaws.com/a?... failed"),
        ("url 'https://host/a?sig=1&x=2', retried", "url 'https://host/a?...', retried"),
        ("https://user:pass@host/a", "https://host/a"),
        ("hf://org/name@main stays", "hf://org/name@main stays"),
        ("Authorization: Bearer sk-12.ab", "Authorization: Bearer ..."),
        ("is this a question? yes", "is this a question? yes"),
    ],
)
def test_secrets_are_cut_out_of_texts(text: str, kept: str) -> None:
    assert without_secrets(text) == kept


def test_every_line_is_an_object_that_names_its_process(written: Any) -> None:
    stream = written(form="json", process="engine")
    structlog.get_logger("ours").info("hello", api_key="sk-1", url="s3://b/a?token=2", adapter="red")
    logging.getLogger("theirs").warning("cannot read %s", "https://b/a?sig=3")
    structlog.get_logger("ours").debug("too much")
    try:
        raise ValueError("https://b/a?sig=4")
    except ValueError:
        structlog.get_logger("ours").exception("broken")
    ours, theirs, broken = map(json.loads, stream.getvalue().splitlines())
    assert (ours["process"], ours["level"], ours["logger"], ours["adapter"]) == ("engine", "info", "ours", "red")
    assert (ours["api_key"], ours["url"]) == ("...", "s3://b/a?...")
    assert (theirs["process"], theirs["event"]) == ("engine", "cannot read https://b/a?...")
    assert "ValueError: https://b/a?..." in broken["exception"]
    assert not [secret for secret in ("sk-1", "token=2", "sig=3", "sig=4") if secret in stream.getvalue()]


def test_the_console_hides_them_too(written: Any) -> None:
    stream = written(form="console")
    try:
        raise ValueError("https://b/a?sig=4")
    except ValueError:
        structlog.get_logger("ours").exception("broken")
    assert "ValueError" in stream.getvalue()
    assert "sig=4" not in stream.getvalue()


def test_the_engine_follows_requests_at_debug_alone(written: Any) -> None:
    written(level="info")
    assert not RequestLog().is_on
    stream = written(level="debug", form="json", process="engine")
    log = RequestLog()
    assert log.is_on
    params = SamplingParams(max_tokens=2)
    red = AdapterRef(name="red", path="/red")
    for name in ("one", "two", "three"):
        log.taken(Generate(request_id=name, prompt_ids=[1], params=params, adapter=red, n=2, origin=f"req-{name}"))
    began = BeginTimes(1.0, 1.5, 2.0, [AdapterUse("red", "0123456789abcdef")])
    ended = EndTimes(3.0, [2.5])
    outputs = [
        TokenOutput(request_id="one", index=0, token_ids=[1], began=began),
        TokenOutput(request_id="one", index=0, token_ids=[1], over=ended, finish_reason="stop"),
        TokenOutput(request_id="one", index=1, token_ids=[1], over=ended, finish_reason="length"),
    ]
    failure = RequestFailed(request_id="two", error=ErrorInfo(name="EngineError", message="no"), origin="req-two")
    log.told(outputs, [failure])
    log.aborted("three", 0)
    log.aborted("three", None)
    log.aborted("three", None)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [(line["request_id"], line["event"]) for line in lines[3:]]
    assert told == [
        ("req-one", "a request has its first token"),
        ("req-one", "a choice is over"),
        ("req-one", "a choice is over"),
        ("req-two", "a request failed"),
        ("req-three", "a request was given up"),
        ("req-three", "a request was given up"),
    ]
    assert lines[3]["adapter"] == "red"
    assert lines[3]["queue_ms"] == 500
    assert lines[3]["adapter_identities"] == ["0123456789ab"]
    assert lines[4]["preemptions"] == 1
