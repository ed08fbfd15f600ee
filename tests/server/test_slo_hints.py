from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.errors import EngineError
from loraplex.server.request_timing import RequestTiming
from loraplex.server.slo_hints import SloCounts, SloHints, slo_hints

TTFT, TPOT = "x-slo-ttft-ms", "x-slo-tpot-ms"


def counted(counts: SloCounts) -> dict[tuple[str, ...], float]:
    return {labels: value for labels, value in counts.values() if value}


def ask(client: TestClient, **headers: str) -> dict[tuple[str, ...], float]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4}, headers=sent)
    return counted(client.app.state.edge.metrics.slo)


@pytest.mark.parametrize("bad", ["", "soon", "0", "-5", "nan", "inf", "1e999", "1,5", "1 s"])
def test_a_hint_that_is_no_positive_number_is_ignored(client: TestClient, bad: str) -> None:
    assert slo_hints({TTFT: bad, TPOT: bad}) == SloHints()
    assert client.post("/v1/completions", json={"prompt": "a"}, headers={TTFT: bad, TPOT: bad}).status_code == 200
    assert not counted(client.app.state.edge.metrics.slo)


def test_hints_are_counted_as_met_or_missed(client: TestClient, engine: Any) -> None:
    engine.script.delay = 0.002
    assert ask(client, x_slo_ttft_ms="60000", x_slo_tpot_ms="60000") == {("ttft", "met"): 1, ("tpot", "met"): 1}
    found = ask(client, x_slo_ttft_ms="0.001", x_slo_tpot_ms="0.001")
    assert found == {("ttft", "met"): 1, ("tpot", "met"): 1, ("ttft", "missed"): 1, ("tpot", "missed"): 1}
    assert ask(client) == found, "no hint, no count"


def test_a_request_that_failed_has_missed_its_hints(client: TestClient, engine: Any) -> None:
    engine.script.error = EngineError("broke")
    assert ask(client, x_slo_ttft_ms="60000", x_slo_tpot_ms="9000") == {("ttft", "missed"): 1, ("tpot", "missed"): 1}


def test_a_request_that_was_given_up_has_missed_what_was_overdue_and_nothing_else() -> None:
    counts, timing = SloCounts(), RequestTiming()
    counts.count(SloHints(first_token=60, per_token=60), timing, "aborted")
    assert not counted(counts)
    counts.count(SloHints(first_token=1e-9), timing, "aborted")
    assert counted(counts) == {("ttft", "missed"): 1}
    timing.token_came(0)
    counts.count(SloHints(first_token=60, per_token=60), timing, "aborted")
    assert counted(counts) == {("ttft", "missed"): 1, ("ttft", "met"): 1}


def test_headers_of_gateways_are_let_through(client: TestClient) -> None:
    headers = {
        "x-gateway-inference-objective": "high-priority",
        "x-gateway-inference-fairness-id": "tenant-a",
        "x-gateway-destination-endpoint": "10.0.0.1:8000",
        "x-gateway-model-name": "red",
        "x-llm-d-request-dropped-reason": "none",
        "x-gateway-base-model-name": "tiny",
    }
    answer = client.post("/v1/completions", json={"prompt": "a", "model": "red"}, headers=headers)
    assert (answer.status_code, answer.json()["model"]) == (200, "red")


@pytest.mark.parametrize("ordered", [True, False])
def test_hopes_for_the_first_token_reach_the_scheduler_unless_the_order_is_of_arrival(
    make_client: Callable[..., TestClient], engine: Any, ordered: bool
) -> None:
    with make_client(slo_order=ordered) as client:
        ask(client, x_slo_ttft_ms="250", x_slo_tpot_ms="10")
        ask(client)
    assert [command.first_token_within for command in engine.commands] == [0.25 if ordered else None, None]
