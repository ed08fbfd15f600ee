"""Many more adapters in use than the host store and the pool have room for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from loraplex.server.demo.assets import adapters_folder

COPIES = 5


def test_thirty_adapters_on_three_places_are_all_answered(
    load: Any, chaos: Any, adapters: Any, wait_until: Callable[..., bool]
) -> None:
    before = chaos.metrics().value("loraplex_adapter_loads_total")
    with load.Load(chaos, [*adapters.names, None], clients=12) as running, load.HealthWatch(chaos) as health:
        running.wait_for_answers(90, seconds=120)
    assert not running.failures, running.failures[:3]
    assert health.statuses == [200]
    assert wait_until(chaos.is_idle)
    metrics = chaos.metrics()
    assert metrics.value("loraplex_adapter_loads_total") > before
    assert metrics.value("loraplex_adapter_evictions_total", tier="host") > 0
    assert metrics.value("loraplex_tier_bytes", tier="host") <= metrics.value("loraplex_tier_limit_bytes", tier="host")
    uses = ("kv", "cached", "adapter", "free")
    assert sum(metrics.value("loraplex_pool_pages", use=use) for use in uses) == metrics.value(
        "loraplex_pool_capacity_pages"
    )


def test_an_adapter_larger_than_the_host_store_is_an_error_while_others_go_on(
    load: Any, chaos: Any, adapters: Any
) -> None:
    path = str(adapters_folder() / "sort")
    with load.Load(chaos, ("upper-00", "echo-01", None), clients=3) as running:
        refused = chaos.post("/v1/adapters", {"id": "large", "path": path})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["code"] == "adapter_too_large"
        assert "'large'" in error["message"]
        assert "host store" in error["message"]
        assert chaos.get("/v1/adapters/large").status_code == 404
        running.wait_for_answers(3)
    assert not running.failures


def test_mixes_that_together_want_more_than_the_host_store_holds_take_turns(
    load: Any, chaos: Any, wait_until: Callable[..., bool]
) -> None:
    def mixed(number: int) -> httpx2.Response:
        names = [f"{task}-{number % COPIES:02}" for task in ("reverse", "caesar")]
        mix = {"adapters": [{"id": name, "weight": 0.5} for name in names]}
        body = {"messages": [{"role": "user", "content": "kernel"}], "max_tokens": 4, "adapter_id": mix}
        return httpx2.post(f"{chaos.url}/v1/chat/completions", json=body, timeout=60)

    with load.Load(chaos, ("upper-00", None), clients=2) as running, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(mixed, range(18)))
        running.wait_for_answers(3)
    assert not running.failures
    assert [answer.status_code for answer in answers] == [200] * 18, [answer.text for answer in answers]
    assert wait_until(chaos.is_idle)
