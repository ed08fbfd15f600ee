"""``/metrics`` after some traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

HI: Any = [{"role": "user", "content": "hi"}]
NAMES = {
    "loraplex_adapter_evictions",
    "loraplex_adapter_load_seconds",
    "loraplex_adapter_loads",
    "loraplex_adapter_lookups",
    "loraplex_engine_restarts",
    "loraplex_engine_up",
    "loraplex_errors",
    "loraplex_generation_tokens",
    "loraplex_inter_token_seconds",
    "loraplex_pool_capacity_pages",
    "loraplex_pool_held_pages",
    "loraplex_pool_pages",
    "loraplex_preemptions",
    "loraplex_prompt_tokens",
    "loraplex_request_queue_seconds",
    "loraplex_request_seconds",
    "loraplex_requests",
    "loraplex_requests_running",
    "loraplex_requests_waiting",
    "loraplex_tenant_requests",
    "loraplex_tenant_time_to_first_token_seconds",
    "loraplex_tier_adapters",
    "loraplex_tier_bytes",
    "loraplex_tier_limit_bytes",
    "loraplex_time_to_first_token_seconds",
}
TIMES = ("request_queue", "time_to_first_token", "inter_token", "request")


def pool_hits(metrics: Any) -> float:
    return float(metrics.value("loraplex_adapter_lookups_total", tier="pool", result="hit"))


@pytest.fixture
def traffic(demo: Any, wait_until: Callable[..., bool]) -> Any:
    """Metrics before and after: an answer of ten tokens from the base, two from an adapter, and an error."""
    demo.ask("hi", max_tokens=1)  # counters of answers by status appear with the first one
    assert wait_until(demo.is_idle)
    before = demo.metrics()
    ten: Any = {"messages": HI, "max_tokens": 10, "ignore_eos": True}
    for model in ("loraplex-demo", "upper", "upper"):
        assert demo.post("/v1/chat/completions", {**ten, "model": model}).status_code == 200
    assert demo.post("/v1/chat/completions", {**ten, "model": "nobody"}).status_code == 404
    # The engine tells its numbers a few times a second.
    assert wait_until(lambda: pool_hits(demo.metrics()) > pool_hits(before) and demo.is_idle())
    return before, demo.metrics()


def test_every_name_of_the_list_is_there(demo: Any) -> None:
    metrics = demo.metrics()
    assert metrics.families.keys() >= NAMES
    assert all(family.documentation for family in metrics.families.values())


def test_traffic_is_counted(traffic: Any) -> None:
    before, after = traffic

    def grown(name: str, **labels: str) -> float:
        return float(after.value(name, **labels) - before.value(name, **labels))

    prompt = len("hi") + 4
    for kind, count in (("base", 1), ("adapter", 2)):
        assert grown("loraplex_generation_tokens_total", kind=kind) == 10 * count
        assert grown("loraplex_prompt_tokens_total", kind=kind) == prompt * count
        assert grown("loraplex_requests_total", kind=kind, outcome="finished") == count
        assert grown("loraplex_time_to_first_token_seconds_count", kind=kind) == count
        assert grown("loraplex_request_queue_seconds_count", kind=kind) == count
        assert grown("loraplex_inter_token_seconds_count", kind=kind) == 9 * count
    assert grown("loraplex_errors_total", type="not_found_error") == 1
    assert grown("loraplex_http_requests_total", endpoint="/v1/chat/completions", status="200") == 3
    assert grown("loraplex_adapter_lookups_total", tier="pool", result="hit") >= 1
    assert grown("loraplex_engine_restarts_total") == 0


def test_times_make_sense(traffic: Any) -> None:
    before, after = traffic
    spent = {}
    for name in TIMES:
        total = f"loraplex_{name}_seconds_sum"
        spent[name] = after.value(total) - before.value(total)
    assert 0 < spent["request_queue"] < spent["time_to_first_token"] < spent["request"] < 60
    assert 0 < spent["inter_token"] < spent["request"]
    buckets = [one for one in after.families["loraplex_request_seconds"].samples if one.name.endswith("_bucket")]
    assert {one.labels["le"] for one in buckets} > {"0.1", "1.0", "+Inf"}


def test_adapters_and_pages_are_accounted_for(traffic: Any) -> None:
    _, after = traffic
    assert after.value("loraplex_engine_up") == 1
    assert after.value("loraplex_tier_adapters", tier="pool") >= 1
    assert after.value("loraplex_tier_adapters", tier="host") >= 1
    assert after.value("loraplex_tier_bytes", tier="host") > 0
    paged_in = after.value("loraplex_adapter_load_seconds_count", target="pool")
    assert paged_in == after.value("loraplex_adapter_loads_total") >= 1
    assert after.value("loraplex_pool_pages", use="kv") == 0
    assert after.value("loraplex_pool_pages", use="adapter") >= 1
    assert after.value("loraplex_pool_pages") == after.value("loraplex_pool_capacity_pages")
