from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from loraplex.server.errors import EngineError
from loraplex.server.histogram import Histogram
from loraplex.server.messages import AdapterRef, AdapterState, EngineStats, TierCount, TierLoad, TierUse

EXPERTS = "loraplex_expert_tokens"

Sample = tuple[str, tuple[tuple[str, str], ...]]


def scrape(client: TestClient) -> dict[Sample, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(client: TestClient, name: str, **labels: str) -> float:
    return scrape(client)[name, tuple(sorted(labels.items()))]


def test_requests_and_tokens_are_counted_by_kind(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "model": "red"})
    client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2, "n": 2})
    assert value(client, "loraplex_prompt_tokens_total", kind="adapter") == 3
    assert value(client, "loraplex_generation_tokens_total", kind="adapter") == 4
    assert value(client, "loraplex_prompt_tokens_total", kind="base") == 2
    assert value(client, "loraplex_generation_tokens_total", kind="base") == 8
    assert value(client, "loraplex_time_to_first_token_seconds_count", kind="base") == 1
    assert value(client, "loraplex_inter_token_seconds_count", kind="adapter") == 3
    assert value(client, "loraplex_request_queue_seconds_count", kind="base") == 1
    assert value(client, "loraplex_request_seconds_count", kind="base") == 1
    assert value(client, "loraplex_choices_finished_total", kind="base", reason="length") == 4
    assert value(client, "loraplex_http_requests_total", endpoint="/v1/completions", status="200") == 2


def test_errors_are_counted_by_type_also_in_mid_stream(client: TestClient, engine: Any) -> None:
    client.post("/v1/completions", json={})
    engine.script.error, engine.script.error_after = EngineError("broke"), 1
    client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert value(client, "loraplex_errors_total", type="invalid_request_error") == 1
    assert value(client, "loraplex_errors_total", type="server_error") == 1
    assert value(client, "loraplex_requests_total", kind="base", outcome="failed") == 1


def test_paths_and_names_of_clients_make_no_labels(client: TestClient) -> None:
    for name in ("a", "b", "c"):
        client.get(f"/v1/models/{name}")
        client.get(f"/{name}")
    samples = scrape(client)
    endpoints = {dict(labels)["endpoint"] for name, labels in samples if name == "loraplex_http_requests_total"}
    assert endpoints <= {"/v1/models/{model_id:path}", "other", "/metrics"}
    assert len(endpoints) >= 2


def test_the_engines_snapshot_is_shown(client: TestClient, engine: Any) -> None:
    engine.stats = EngineStats(
        running=3,
        waiting=2,
        pages_total=64,
        pages_kv=10,
        pages_adapter=20,
        pages_free=30,
        pages_cached=4,
        pages_held=25,
        host_bytes=1000,
        host_bytes_limit=2000,
        adapter_loads=6,
        tiers=[TierUse("pool", "lora", 4, 500, 8), TierUse("host", "lora", 8, 900), TierUse("host", "dora", 1, 100)],
        lookups=[TierCount("pool", "hit", 5), TierCount("pool", "miss", 6)],
        evictions=[TierCount("pool", "room", 7)],
        adapter_load_failures=1,
        preemptions=8,
        prefix_hit_tokens=48,
        tier_loads=[TierLoad("disk", "host", 0.003), TierLoad("host", "pool", 0.2)],
    )
    for callback in engine.on_stats:
        callback(engine.stats)
    assert value(client, "loraplex_requests_running") == 3
    assert value(client, "loraplex_requests_waiting") == 2
    assert [value(client, "loraplex_pool_pages", use=use) for use in ("kv", "adapter", "cached", "free")] == [
        10,
        20,
        4,
        30,
    ]
    assert value(client, "loraplex_pool_held_pages") == 25
    assert value(client, "loraplex_tier_adapters", tier="host", kind="lora") == 8
    assert value(client, "loraplex_tier_bytes", tier="host", kind="dora") == 100
    assert value(client, "loraplex_tier_limit_bytes", tier="host") == 2000
    assert value(client, "loraplex_pool_adapter_pages", kind="lora") == 8
    assert value(client, "loraplex_adapter_lookups_total", tier="pool", result="miss") == 6
    assert value(client, "loraplex_adapter_lookups_total", tier="host", result="hit") == 0
    assert value(client, "loraplex_adapter_evictions_total", tier="pool", reason="room") == 7
    assert value(client, "loraplex_preemptions_total") == 8
    assert value(client, "loraplex_prefix_hit_tokens_total") == 48
    assert value(client, "loraplex_adapter_load_seconds_count", source="host", target="pool") == 1
    assert value(client, "loraplex_adapter_load_seconds_count", source="remote", target="disk") == 0
    assert value(client, "loraplex_adapters_registered") == 2


def test_experts_are_counted_for_the_adapters_that_the_engine_names(client: TestClient, engine: Any) -> None:
    engine.stats = EngineStats(expert_tokens={"red": [5, 0, 7], 'bl"ue': [1]})
    counted = {labels: value for (name, labels), value in scrape(client).items() if name.startswith(EXPERTS)}
    assert counted == {
        (("adapter", "red"), ("expert", "0")): 5,
        (("adapter", "red"), ("expert", "1")): 0,
        (("adapter", "red"), ("expert", "2")): 7,
        (("adapter", 'bl"ue'), ("expert", "0")): 1,
    }
    engine.stats = EngineStats()
    assert not any(name.startswith(EXPERTS) for name, _ in scrape(client))


def test_adapters_are_told_by_name_where_they_are_up_to_the_limit(make_client: Any, engine: Any) -> None:
    client = make_client(max_adapter_series=3)
    engine.adapters.update(
        [AdapterState(path=f"/adapters/{name}", revision=0, tier="host") for name in ("red", "blue")]
    )
    assert value(client, "loraplex_adapter_held", adapter="red", tier="host", pinned="false") == 1
    engine.adapters.update([AdapterState(path="/adapters/red", revision=0, tier="pool", pinned=True)])
    assert held(client) == {("red", "pool", "true"), ("blue", "host", "false")}
    engine.adapters.update([AdapterState(path="/adapters/blue", revision=0), AdapterState(path="/gone", revision=0)])
    assert held(client) == {("red", "pool", "true")}
    registry = client.app.state.edge.registry
    for number in range(5):
        registry.register(AdapterRef(name=str(number), path=f"/{number}"))
        engine.adapters.update([AdapterState(path=f"/{number}", revision=0, tier="pool")])
    assert held(client) == {(str(number), "pool", "false") for number in (2, 3, 4)}, "those that came last"
    engine.adapters.clear()
    assert held(client) == set()


def held(client: TestClient) -> set[tuple[str, ...]]:
    samples = scrape(client)
    found = [dict(labels) for name, labels in samples if name == "loraplex_adapter_held"]
    return {(labels["adapter"], labels["tier"], labels["pinned"]) for labels in found}


def test_restarts_are_those_that_the_supervisor_made_even_before_a_step(client: TestClient, engine: Any) -> None:
    assert value(client, "loraplex_engine_restarts_total") == 0
    engine.restarts = 2
    assert value(client, "loraplex_engine_restarts_total") == 2


def test_openmetrics_is_written_where_asked_for(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_two_apps_count_apart(make_client: Any) -> None:
    first, second = make_client(), make_client()
    first.post("/v1/completions", json={"prompt": "a"})
    assert value(second, "loraplex_prompt_tokens_total", kind="base") == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_no_fault(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "a"})
    text = client.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@given(st.lists(st.floats(0, 400), max_size=50))
def test_a_histogram_counts_what_is_not_above_each_bound(values: list[float]) -> None:
    histogram = Histogram()
    for one in values:
        histogram.observe(one)
    for bound, count in histogram.buckets():
        assert count == sum(1 for one in values if one <= float(bound))
    assert histogram.sum == pytest.approx(sum(values))
