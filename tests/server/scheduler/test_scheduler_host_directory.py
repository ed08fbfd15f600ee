"""The scheduler over the real host store, which reads made-up adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_spec import FFN, AdapterSpec, BaseShape, LowRankPair, Router, Routing, RoutingScope
from loraplex.memory.adapter_store import Absent, AdapterStore
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server import host_directory
from loraplex.server.adapter_directory import AdapterReady
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import AdapterRef, Generate, SamplingParams, WeightedAdapter
from loraplex.server.scheduler import SampledToken, Scheduler, SchedulerConfig

SHAPE = BaseShape(1, {"gate_proj": (128, 128)}, {})
UNIT = 2 * 128 * 4
"""Bytes of an image of rank 1."""


def read(path: str) -> AdapterSpec:
    """An adapter of rank 1, and of the kind that its path begins with."""
    pair = LowRankPair("gate_proj", 0, torch.ones(1, 128), torch.ones(128, 1), 1.0)
    spec = AdapterSpec(f"content of {path}", "lora", (pair,))
    kind = path.partition("-")[0]
    if kind == "activated":
        return replace(spec, invocation=(5, 6))
    if kind in ("ffn", "linear"):
        scope: RoutingScope = "ffn" if kind == "ffn" else "linear"
        router = Router(0, FFN if kind == "ffn" else "gate_proj", torch.zeros(3, 128))
        experts = tuple(replace(pair, expert=expert) for expert in range(3))
        return replace(spec, pairs=experts, routers=(router,), routing=Routing(scope, 3, 2, renormalize=True))
    return spec


def ref(path: str) -> AdapterRef:
    return AdapterRef(name=path, path=path)


class Host:
    """A scheduler, a directory and a store of ``units`` images of rank 1, with a clock of ours."""

    def __init__(self, units: int) -> None:
        self.now = 0.0
        self.failed: dict[str, str] = {}
        self.pool = PagePool(100)
        self.store = AdapterStore(SHAPE, 128, torch.float32, byte_limit=units * UNIT, reader=read, threads=1)
        adapters = AdapterCache(self.pool)
        self.directory = HostDirectory(self.store, adapters, 100)
        kv = KvCache(self.pool, page_tokens=4)
        config = SchedulerConfig(max_model_len=100)
        self.scheduler = Scheduler(config, self.pool, kv, adapters, self.directory, clock=lambda: self.now)

    def ready(self, path: str) -> AdapterReady:
        wait_until(lambda: isinstance(self.directory.lookup(ref(path)), AdapterReady))
        status = self.directory.lookup(ref(path))
        assert isinstance(status, AdapterReady)
        return status

    def arrive(self) -> None:
        for identity in self.scheduler.page_ins.under_way:
            self.scheduler.page_ins.end(identity)

    def step(self) -> list[str] | None:
        """Requests that ended in one step; None where nothing did."""
        plan = self.scheduler.schedule()
        self.failed |= {message.request_id: message.error.name for message in plan.failed}
        results = {chunk.sequence.seq_id: SampledToken(1) for chunk in plan.chunks}
        self.arrive()
        ended = [output.request_id for output in self.scheduler.complete(plan, results)]
        self.scheduler.check_integrity()
        return [*ended, *(message.request_id for message in plan.failed)] or None

    def add_mix(self, name: str, *paths: str) -> None:
        parts = tuple(WeightedAdapter(adapter=ref(path), weight=1.0) for path in paths)
        self.scheduler.add(Generate(request_id=name, prompt_ids=[1, 2], params=SamplingParams(max_tokens=1), mix=parts))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.001)


@pytest.fixture
def make_host() -> Iterator[Callable[[int], Host]]:
    made: list[Host] = []

    def make(units: int) -> Host:
        made.append(Host(units))
        return made[-1]

    yield make
    for host in made:
        host.store.close()


@pytest.mark.parametrize(
    ("path", "invocation", "problem"),
    [
        ("plain", (), None),
        ("linear", (), None),
        ("activated", (5, 6), "is an activated LoRA, which cannot be part of a mix"),
        ("ffn", (), "has experts that are whole feed-forward networks, which cannot be part of a mix"),
    ],
)
def test_the_scheduler_hears_where_adapters_begin_and_which_cannot_be_mixed(
    make_host: Callable[[int], Host], path: str, invocation: tuple[int, ...], problem: str | None
) -> None:
    status = make_host(20).ready(path)
    assert (status.invocation, status.mix_problem) == (invocation, problem)


def test_clients_hear_the_number_of_experts_and_nothing_of_what_was_merged(
    make_host: Callable[[int], Host],
) -> None:
    host = make_host(20)
    for path in ("plain", "ffn", "merged:{}"):
        host.ready(path)
    states = [host.directory.state((path, 0), pinned=False) for path in ("plain", "ffn")]
    assert [(state.tier, state.info.num_experts) for state in states if state.info] == [("host", 0), ("host", 3)]
    assert host.directory.info(ref("merged:{}")) is None
    assert host.directory.ref_of(host.ready("merged:{}").identity) is None


def test_what_lies_in_the_pool_is_at_hand_though_the_host_has_it_no_more(make_host: Callable[[int], Host]) -> None:
    host = make_host(1)
    status = host.ready("a")
    host.scheduler.add(Generate(request_id="r", prompt_ids=[1], params=SamplingParams(max_tokens=1), adapter=ref("a")))
    assert host.step() == ["r"]
    host.arrive()
    host.ready("b")
    assert not host.store.holds(status.identity)
    assert host.directory.is_at_hand(ref("a"))
    assert host.directory.lookup(ref("a")) == status
    assert host.directory.state(("a", 0), pinned=False).tier == "pool"
    assert host.directory.state(("b", 0), pinned=False).tier == "host"


def test_only_so_many_merges_are_remembered(make_host: Callable[[int], Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_directory, "_MAX_MERGES", 2)
    host = make_host(20)
    for number in range(4):
        host.ready(f"merged:{number}")
    assert [host.store.content(f"merged:{number}", 0) is None for number in range(4)] == [True, True, False, False]


def test_a_registration_that_is_kept_stays_until_it_is_forgotten(make_host: Callable[[int], Host]) -> None:
    host = make_host(1)
    host.directory.hold(ref("a"))
    status = host.ready("a")
    host.directory.keep(ref("a"))
    host.store.request("b", 0)
    wait_until(lambda: host.store.stats.waiting_for_room == 1)
    assert host.directory.is_at_hand(ref("a"))
    host.directory.release_hold(ref("a"))
    host.directory.forget(ref("a"))
    host.ready("b")
    assert not host.store.holds(status.identity)


def test_a_mix_that_the_host_can_never_hold_fails_and_others_go_on(make_host: Callable[[int], Host]) -> None:
    host = make_host(2)
    host.add_mix("too many", "a", "b", "c")
    wait_until(lambda: host.step() is None and host.store.stats.waiting_for_room == 1)
    host.now += 4.0
    assert host.step() is None
    host.now += 6.0
    wait_until(lambda: host.step() is not None)
    assert host.failed == {"too many": "AdapterTooLargeError"}
    host.add_mix("fits", "d", "e")
    wait_until(lambda: host.step() == ["fits"])


def test_mixes_that_could_keep_each_other_from_the_host_are_served_one_after_the_other(
    make_host: Callable[[int], Host],
) -> None:
    host = make_host(2)
    for path in "ac":
        host.ready(path)
    host.add_mix("first", "a", "b")
    host.add_mix("second", "c", "d")
    ended: list[str] = []

    def both() -> bool:
        ended.extend(host.step() or [])
        return len(ended) == 2

    # No time passes on the scheduler's clock: nobody is given up.
    wait_until(both)
    assert ended == ["first", "second"]
    assert not host.failed
    assert not host.scheduler.has_work


def test_a_mix_waits_behind_one_that_the_host_cannot_hold_and_goes_on_when_that_is_given_up(
    make_host: Callable[[int], Host],
) -> None:
    host = make_host(2)
    for path in "ad":
        host.ready(path)
    host.add_mix("too many", "a", "b", "c")
    host.add_mix("second", "d", "e")
    wait_until(lambda: host.step() is None and host.store.stats.waiting_for_room == 1)
    assert not host.store.waits_for_room([("e", 0)])
    assert isinstance(host.store.state("e", 0), Absent), "the second mix asks for nothing yet"
    assert host.step() is None  # which sees that nothing can go on
    host.now += 6.0
    wait_until(lambda: host.step() == ["too many"])
    wait_until(lambda: host.step() == ["second"])
    assert host.failed == {"too many": "AdapterTooLargeError"}
    assert not host.scheduler.has_work


def test_a_load_is_told_with_its_fetch_where_that_was_part_of_it(make_host: Callable[[int], Host]) -> None:
    host = make_host(2)
    status = host.ready("plain")
    [load] = status.loads
    assert (load.source, load.target, load.num_bytes) == ("disk", "host", UNIT)
    assert load.ended is not None
    assert 0 < load.started <= load.ended <= time.monotonic()
    directory = HostDirectory(
        host.store, AdapterCache(host.pool), 100, last_fetch=lambda _: (load.started, load.started)
    )
    fetched = directory.lookup(ref("plain"))
    assert isinstance(fetched, AdapterReady)
    assert [(one.source, one.target) for one in fetched.loads] == [("remote", "disk"), ("disk", "host")]
    assert fetched.loads[1].ended == load.ended
    directory = HostDirectory(host.store, AdapterCache(host.pool), 100, last_fetch=lambda _: (0.0, 0.0))
    long_ago = directory.lookup(ref("plain"))
    assert isinstance(long_ago, AdapterReady)
    assert long_ago.loads == (load,)
