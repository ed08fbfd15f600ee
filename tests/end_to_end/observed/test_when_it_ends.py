"""The end of the engine, and of the server. These come last: they end it."""

from __future__ import annotations

import os
import signal
from typing import Any

import openai
import pytest

TRACE = "5bf92f3577b34da6a3ce929d0e0e{:04x}"


def traceparent(number: int) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE.format(number)}-00f067aa0ba902b7-01"}


def test_when_the_engine_dies_the_spans_end_with_an_error(observed: Any, spans_of: Any) -> None:
    with observed.openai() as client:
        stream = client.chat.completions.create(
            model="loraplex-demo",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers=traceparent(1),
        )
        next(stream)
        os.kill(observed.engine_pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
    server, *rest = spans_of(TRACE.format(1))
    assert server.is_error
    assert server.attributes["loraplex.outcome"] == "failed"
    assert rest[-1].name == "decode"
    assert rest[-1].is_error


def test_what_has_not_been_sent_when_the_server_ends_is_sent_then(observed: Any, spans_of: Any) -> None:
    assert observed.request("GET", "/v1/models", headers=traceparent(2)).status_code == 200
    assert observed.stop() == 0
    assert spans_of(TRACE.format(2))
