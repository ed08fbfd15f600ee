"""The metrics under vLLM's names: just these, bounded, and true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from loraplex.server.messages import AdapterRef, AdapterState, EngineStats, TierUse

MODEL = {"model_name": "tiny", "engine": "0"}
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:lora_adapter_loaded",
    "vllm:num_gpu_loaded_lora_adapters",
    "vllm:max_gpu_lora_adapters",
    "vllm:num_cpu_loaded_lora_adapters",
}
COUNTERS = {"vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success"}
TIMES = {
    "vllm:time_to_first_token_seconds": "loraplex_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "loraplex_inter_token_seconds",
    "vllm:e2e_request_latency_seconds": "loraplex_request_seconds",
    "vllm:request_queue_time_seconds": "loraplex_request_queue_seconds",
}


def scrape(client: TestClient) -> dict[str, Any]:
    families = {one.name: one for one in text_string_to_metric_families(client.get("/metrics").text)}
    assert len(families) > 20
    return families


def samples(client: TestClient, name: str) -> list[tuple[dict[str, str], float]]:
    return [(one.labels, one.value) for one in scrape(client)[name].samples]


def value(client: TestClient, name: str) -> float:
    [(labels, number)] = samples(client, name)
    assert labels == MODEL
    return float(number)


@pytest.fixture
def vllm(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client(metrics_compat="vllm")


@pytest.fixture
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None and os.environ.get("CI") == "true":
        pytest.fail("promtool is not installed")
    return path or pytest.skip("promtool is not installed")


def tell(engine: Any, name: str, tier: str, rank: int = 8, pinned: bool = False) -> None:
    engine.facts = {"rank": rank}
    engine.tell(AdapterRef(name=name, path=f"/adapters/{name}"), tier=tier, pinned=pinned)


def test_they_are_there_only_where_asked_for(client: TestClient, vllm: TestClient) -> None:
    assert not any(name.startswith("vllm:") for name in scrape(client))
    found = {name: family.type for name, family in scrape(vllm).items() if name.startswith("vllm:")}
    assert found == (
        dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(TIMES, "histogram")
    )


def test_they_tell_of_the_last_snapshot(vllm: TestClient, engine: Any) -> None:
    engine.stats = EngineStats(
        running=3,
        waiting=2,
        pages_total=64,
        pages_held=16,
        pages_free=10,
        pages_cached=6,
        adapters_resident=4,
        tiers=[TierUse("pool", "lora", 3, 1, 9), TierUse("pool", "dora", 1, 1, 2), TierUse("host", "lora", 7, 9)],
    )
    assert value(vllm, "vllm:num_requests_running") == 3
    assert value(vllm, "vllm:num_requests_waiting") == 2
    assert value(vllm, "vllm:kv_cache_usage_perc") == 0.25
    assert value(vllm, "vllm:num_gpu_loaded_lora_adapters") == 4
    assert value(vllm, "vllm:num_cpu_loaded_lora_adapters") == 7
    # 11 pages for 4 adapters are 3 pages each, rounded up; 16 pages without use hold 5 more of them.
    assert value(vllm, "vllm:max_gpu_lora_adapters") == 4 + 5
    assert samples(vllm, "vllm:cache_config_info") == [(MODEL | {"block_size": "16", "num_gpu_blocks": "64"}, 1)]
    engine.stats = EngineStats(running=1)
    assert value(vllm, "vllm:num_requests_running") == 1, "a new snapshot is shown at once"


def test_room_is_measured_by_adapters_on_the_host_where_the_pool_has_none(vllm: TestClient, engine: Any) -> None:
    # A page of the engine has 4096 bytes.
    engine.stats = EngineStats(pages_total=64, pages_free=64, tiers=[TierUse("host", "lora", 2, 8 * 4096)])
    assert value(vllm, "vllm:max_gpu_lora_adapters") == 16


def test_before_an_engine_is_ready_all_but_the_pools_shape_is_there(vllm: TestClient, engine: Any) -> None:
    engine.state = "starting"
    found = {name for name in scrape(vllm) if name.startswith("vllm:")}
    assert found == (GAUGES | COUNTERS | set(TIMES)) - {"vllm:cache_config_info"}
    assert value(vllm, "vllm:num_gpu_loaded_lora_adapters") == 0


def test_one_series_names_who_is_in_the_pool_and_who_is_wanted_there(vllm: TestClient, engine: Any) -> None:
    tell(engine, "red", "pool")
    engine.open = [AdapterRef(name="blue", path="/adapters/blue"), AdapterRef(name="red", path="/adapters/red")]
    engine.stats = EngineStats(
        pages_total=64, pages_free=6, adapters_resident=1, tiers=[TierUse("pool", "lora", 1, 1, 2)]
    )
    [(labels, at)] = samples(vllm, "vllm:lora_requests_info")
    assert labels == {"max_lora": "4", "running_lora_adapters": "red", "waiting_lora_adapters": "blue"}
    assert at == pytest.approx(time.time(), abs=5)
    engine.open = []
    tell(engine, "blue", "pool")
    [(labels, later)] = samples(vllm, "vllm:lora_requests_info")
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("blue,red", "")
    assert later >= at


def test_loaded_adapters_are_told_with_level_pin_and_rank(vllm: TestClient, engine: Any) -> None:
    tell(engine, "red", "pool", rank=64, pinned=True)
    tell(engine, "blue", "host", rank=4)
    assert samples(vllm, "vllm:lora_adapter_loaded") == [
        (MODEL | {"adapter_name": "red", "level": "gpu", "pinned": "true", "rank": "64"}, 1),
        (MODEL | {"adapter_name": "blue", "level": "cpu", "pinned": "false", "rank": "4"}, 1),
    ]
    tell(engine, "red", "disk")
    assert [labels["adapter_name"] for labels, _ in samples(vllm, "vllm:lora_adapter_loaded")] == ["blue"]


def test_requests_are_counted_over_bases_and_adapters(vllm: TestClient) -> None:
    vllm.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "model": "red"})
    vllm.post("/v1/completions", json={"prompt": "ab", "max_tokens": 3})
    assert value(vllm, "vllm:prompt_tokens") == 5
    assert value(vllm, "vllm:generation_tokens") == 7
    reasons = {labels["finished_reason"]: count for labels, count in samples(vllm, "vllm:request_success")}
    assert reasons == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    families = scrape(vllm)
    for theirs, ours in TIMES.items():
        for suffix in ("_sum", "_count", "_bucket"):
            of_theirs = [one.value for one in families[theirs].samples if one.name == theirs + suffix]
            of_ours = [one.value for one in families[ours].samples if one.name == ours + suffix]
            assert sum(of_theirs) == pytest.approx(sum(of_ours))
        assert any(one.value for one in families[theirs].samples)


def test_under_ten_thousand_adapters_with_hostile_names_pages_stay_small(
    make_client: Callable[..., TestClient], engine: Any, registry: Any
) -> None:
    client = make_client(metrics_compat="vllm", max_adapter_series=50)
    names = [f'"}} 1 {number} é%d{{x="' + "n" * 200 for number in range(10_000)]
    registry.register_all(AdapterRef(name=name, path=f"/many/{at}") for at, name in enumerate(names))
    engine.adapters.update(
        [AdapterState(path=f"/many/{at}", revision=0, tier="pool" if at % 2 else "host") for at in range(len(names))]
    )
    engine.open = [AdapterRef(name=names[at], path=f"/many/{at}") for at in range(0, 10_000, 2)]
    families = scrape(client)
    assert len(families["vllm:lora_adapter_loaded"].samples) == 50
    [info] = families["vllm:lora_requests_info"].samples
    running, waiting = (info.labels[f"{which}_lora_adapters"].split(",") for which in ("running", "waiting"))
    assert len(running) == len(waiting) == 50
    assert set(running + waiting) <= set(names)
    assert len(client.get("/metrics").content) < 100_000
    assert sum(len(family.samples) for family in families.values()) < 700


def test_of_more_adapters_than_can_be_named_those_in_use_are(
    make_client: Callable[..., TestClient], engine: Any, registry: Any
) -> None:
    client = make_client(metrics_compat="vllm", max_adapter_series=3)
    registry.register_all(AdapterRef(name=f"a{at}", path=f"/many/{at}") for at in range(10))
    engine.adapters.update([AdapterState(path=f"/many/{at}", revision=0, tier="pool") for at in range(10)])

    def running() -> str:
        [(labels, _)] = samples(client, "vllm:lora_requests_info")
        return labels["running_lora_adapters"]

    assert running() == "a7,a8,a9"
    engine.open = [AdapterRef(name="a0", path="/many/0")]
    assert running() == "a0,a8,a9"
    engine.open = []
    assert running() == "a0,a8,a9", "it was in use last"


def check(promtool: str, text: str) -> list[str]:
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()


def test_promtool_finds_no_fault_but_the_colons_of_vllms_names(vllm: TestClient, engine: Any, promtool: str) -> None:
    tell(engine, "red", "pool")
    vllm.post("/v1/completions", json={"prompt": "a", "model": "red"})
    text = vllm.get("/metrics").text
    ours, theirs = ([], [])  # type: ignore[var-annotated]
    for line in text.splitlines(keepends=True):
        (theirs if re.match(r"(# (HELP|TYPE) )?vllm:", line) else ours).append(line)
    assert check(promtool, "".join(ours)) == []
    colons = check(promtool, "".join(theirs))
    assert len(colons) == len(GAUGES | COUNTERS | set(TIMES))
    assert all(line.endswith("metric names should not contain ':'") for line in colons), colons
    assert check(promtool, "".join(theirs).replace("vllm:", "vllm_")) == []
