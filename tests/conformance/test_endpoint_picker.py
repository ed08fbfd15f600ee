"""The endpoint picker of the Gateway API Inference Extension and of llm-d, as far as it reads us: the extraction of its
data layer, and the affinity by adapter that it scores endpoints with. Written from its protocol; the names are those
that it has for ``llm-d.ai/engine-type: vllm`` without any configuration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

QUEUED = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
USAGE = "vllm:kv_cache_usage_perc"
ADAPTERS = "vllm:lora_requests_info"
CACHE = "vllm:cache_config_info"
LOADED = "vllm:lora_adapter_loaded"
NUM_LOADED = "vllm:num_gpu_loaded_lora_adapters"
SLOTS = "vllm:max_gpu_lora_adapters"


@dataclass
class Endpoint:
    """What the picker knows of a server after a scrape. ``loaded`` is None where residency is not reported."""

    waiting: int = 0
    running: int = 0
    usage: float = 0.0
    active: set[str] = field(default_factory=set)
    queued: set[str] = field(default_factory=set)
    most: int = 0
    block_size: int = 0
    num_blocks: int = 0
    loaded: dict[str, tuple[str, bool, int]] | None = None
    base: str = ""


def gauges(text: str) -> dict[str, list[Any]]:
    """Samples by family. What is extracted must be gauges: the value of another type is read as 0."""
    families = {one.name: one for one in text_string_to_metric_families(text)}
    for name in (QUEUED, RUNNING, USAGE, ADAPTERS, CACHE, LOADED, NUM_LOADED, SLOTS):
        assert families[name].type == "gauge", name
    return {name: list(family.samples) for name, family in families.items()}


def csv(text: str) -> set[str]:
    """As the data layer splits: by commas, with the spaces around names cut off, without empty ones."""
    return {name.strip() for name in text.split(",") if name.strip()}


def extract(text: str) -> Endpoint:
    """Of the data layer (since 1.5): the newest series of adapters counts, an unreadable number is an error."""
    found = gauges(text)
    newest = max(found[ADAPTERS], key=lambda one: one.value)
    [cache] = found[CACHE]
    [number] = found[NUM_LOADED]
    loaded: dict[str, tuple[str, bool, int]] = {}
    for one in found[LOADED]:
        name, level = one.labels["adapter_name"], one.labels["level"]
        if one.value and (name not in loaded or level == "gpu"):
            loaded[name] = level, one.labels["pinned"] == "true", int(one.labels["rank"])
    return Endpoint(
        waiting=int(found[QUEUED][0].value),
        running=int(found[RUNNING][0].value),
        usage=found[USAGE][0].value,
        active=csv(newest.labels["running_lora_adapters"]),
        queued=csv(newest.labels["waiting_lora_adapters"]),
        most=max(int(one.value) for one in found[SLOTS]),
        block_size=int(cache.labels["block_size"]),
        num_blocks=int(cache.labels["num_gpu_blocks"]),
        loaded=loaded,
        base=number.labels["model_name"],
    )


def extract_old(text: str) -> tuple[set[str], set[str], int]:
    """Before the data layer: series with no adapter at all are passed over, and spaces belong to names."""
    named = [
        one
        for one in gauges(text)[ADAPTERS]
        if one.labels["running_lora_adapters"] or one.labels["waiting_lora_adapters"]
    ]
    assert named
    labels = max(named, key=lambda one: one.value).labels
    running, waiting = labels["running_lora_adapters"], labels["waiting_lora_adapters"]
    split = (set(running.split(",")) if running else set(), set(waiting.split(",")) if waiting else set())
    return (*split, int(labels["max_lora"]))


def affinity(endpoint: Endpoint, model: str) -> float:
    """``lora-affinity-scorer``: here; room for one more; on its way here; neither."""
    if model in endpoint.active:
        return 1.0
    if len(endpoint.active) + len(endpoint.queued) < endpoint.most:
        return 0.8
    return 0.6 if model in endpoint.queued else 0.0


def pick(endpoints: Sequence[Endpoint], model: str) -> int:
    """The place of the endpoint with the highest score: affinity, then the shortest queue, then the emptiest pool."""
    scores = [(affinity(one, model), -one.waiting, -one.usage) for one in endpoints]
    return max(range(len(scores)), key=scores.__getitem__)


def scrape(replica: Any) -> str:
    """As Go's client asks: no Accept header, gzip taken."""
    answer = replica.call("GET", "/metrics", headers={"accept-encoding": "gzip", "accept": ""})
    assert (answer.status_code, answer.headers["content-encoding"]) == (200, "gzip")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return str(answer.text)


@contextmanager
def load(replica: Any, model: str, clients: int) -> Iterator[None]:
    """So many clients that ask for long answers until the end of the block."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            assert replica.ask(model, max_tokens=64, ignore_eos=True).status_code == 200

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_an_idle_server_is_extracted_in_full(replica: Any) -> None:
    endpoint = extract(scrape(replica))
    assert (endpoint.waiting, endpoint.running, endpoint.usage) == (0, 0, 0.0)
    assert endpoint.block_size == 16
    assert endpoint.num_blocks > 100
    assert endpoint.most > 0
    assert endpoint.loaded is not None
    assert endpoint.base == "loraplex-demo", "requests for it need no adapter"


def test_load_is_extracted_while_it_lasts(replica: Any, wait_until: Callable[..., bool]) -> None:
    with load(replica, "upper", clients=5):
        found: list[Endpoint] = []

        def busy() -> bool:
            found.append(extract(scrape(replica)))
            one = found[-1]
            return one.running == 2 and one.waiting >= 1 and one.usage > 0 and "upper" in one.active

        assert wait_until(busy), found[-1]
        assert 0 < found[-1].usage <= 1
        running, waiting, most = extract_old(scrape(replica))
        assert "upper" in running
        assert not running & waiting
        assert most >= len(running)
    assert wait_until(lambda: extract(scrape(replica)).running == extract(scrape(replica)).waiting == 0)
    idle = extract(scrape(replica))
    assert idle.usage == 0, "idle adapters and cached prefixes are room"
    assert "upper" in idle.active, "but the adapter is still here"


def test_residency_is_told_with_levels_ranks_and_pins(replica: Any, wait_until: Callable[..., bool]) -> None:
    assert replica.call("POST", "/v1/adapters/spell/pin", json={}).status_code == 200
    try:
        assert wait_until(lambda: "spell" in (extract(scrape(replica)).loaded or {}))
        level, pinned, rank = (extract(scrape(replica)).loaded or {})["spell"]
        assert (level, pinned) == ("gpu", True)
        assert rank == replica.call("GET", "/v1/adapters/spell").json()["rank"]
        assert wait_until(lambda: extract(scrape(replica)).usage > 0), "pages of a pinned adapter are not to be had"
    finally:
        assert replica.call("POST", "/v1/adapters/spell/unpin", json={}).status_code == 200
    assert wait_until(lambda: extract(scrape(replica)).usage == 0)


def test_requests_go_where_their_adapter_is(replicas: Any, wait_until: Callable[..., bool]) -> None:
    """Affinity by adapter over two servers. The picker is the test's; Loraplex only tells what it is to know."""
    homes = {"reverse": 0, "caesar": 1, "sort": 0, "devowel": 1}
    for model, home in homes.items():
        assert replicas[home].ask(model).status_code == 200

    def picked(model: str) -> int:
        return pick([extract(scrape(one)) for one in replicas], model)

    assert wait_until(lambda: {model: picked(model) for model in homes} == homes)
    loads = [metric(one, "loraplex_adapter_loads_total") for one in replicas]
    for _ in range(3):
        for model in homes:
            assert replicas[picked(model)].ask(model).status_code == 200
    assert [metric(one, "loraplex_adapter_loads_total") for one in replicas] == loads, "nothing was loaded again"


def metric(replica: Any, name: str) -> float:
    families = text_string_to_metric_families(scrape(replica))
    return float(next(one.value for family in families for one in family.samples if one.name == name))


@pytest.mark.parametrize(
    ("endpoint", "score"),
    [
        (Endpoint(active={"a"}, most=1), 1.0),
        (Endpoint(active={"b"}, most=2), 0.8),
        (Endpoint(active={"b"}, queued={"a"}, most=2), 0.6),
        (Endpoint(active={"b"}, queued={"c"}, most=2), 0.0),
    ],
)
def test_the_pickers_rule_is_the_one_that_is_documented(endpoint: Endpoint, score: float) -> None:
    assert affinity(endpoint, "a") == score


def test_answers_carry_the_load_where_a_balancer_asks_for_it(replica: Any) -> None:
    answer = replica.call(
        "POST",
        "/v1/completions",
        json={"model": "loraplex-demo", "prompt": "hi", "max_tokens": 1},
        headers={"endpoint-load-metrics-format": "TEXT", "x-slo-ttft-ms": "5000", "x-gateway-inference-objective": "x"},
    )
    kind, _, rest = answer.headers["endpoint-load-metrics"].partition(" ")
    numbers = dict(pair.split("=") for pair in rest.split(", "))
    assert (kind, set(numbers)) == (
        "TEXT",
        {"named_metrics.kv_cache_usage_perc", "named_metrics.num_requests_waiting"},
    )
    assert all(float(number) >= 0 for number in numbers.values())
    assert 'loraplex_slo_requests_total{outcome="met",slo="ttft"}' in scrape(replica)
