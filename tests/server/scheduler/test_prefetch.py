"""Adapters that come into the pool before a step needs them, and those that an operator keeps there."""

from __future__ import annotations

from typing import Any

from loraplex.server.adapter_directory import AdapterLoading, AdapterReady
from loraplex.server.messages import AdapterRef
from loraplex.server.request import AdapterPages

Make = Any


def pages_of(name: str, num_pages: int = 2) -> AdapterPages:
    return AdapterPages(name, AdapterRef(name=name, path=name), num_pages)


def test_adapters_of_the_next_in_line_come_in_while_the_batch_is_full(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    rig.add("running", max_tokens=20)
    rig.step()
    rig.add("next", adapter="a")
    plan = rig.scheduler.schedule()
    assert [page_in.identity for page_in in plan.page_ins] == ["a"]
    assert [chunk.sequence.request.request_id for chunk in plan.chunks] == ["running"]
    assert rig.adapters.pins("a") == 1, "it is on its way"
    rig.complete(plan)
    assert rig.adapters.pins("a") == 0
    outputs = rig.drain()
    assert rig.adapters.loads == 1
    assert {output.adapter_load_seconds for output in outputs if output.request_id == "next"} >= {0.0}


def test_the_next_in_line_do_not_put_out_what_each_other_has(make_rig: Make) -> None:
    rig = make_rig(num_pages=5, max_running=1)
    rig.add("running", prompt=4, max_tokens=8)
    rig.step()
    for name in "ab":
        rig.add(name, adapter=name)
    brought = []
    for _ in range(4):
        plan = rig.scheduler.schedule()
        brought += [page_in.identity for page_in in plan.page_ins]
        rig.complete(plan)
    assert brought == ["a"]


def test_no_more_are_prefetched_than_the_limit_says(make_rig: Make) -> None:
    rig = make_rig(max_running=1, max_prefetches=2)
    rig.add("running", max_tokens=20)
    rig.step()
    for name in "abcd":
        rig.add(name, adapter=name)
    assert [page_in.identity for page_in in rig.scheduler.schedule().page_ins] == ["a", "b"]


def test_nothing_is_prefetched_where_the_limit_is_none(make_rig: Make) -> None:
    rig = make_rig(max_running=1, max_prefetches=0)
    rig.add("running", max_tokens=20)
    rig.step()
    rig.add("next", adapter="a")
    assert rig.scheduler.schedule().page_ins == []


def test_prefetching_leaves_a_page_for_each_that_runs(make_rig: Make) -> None:
    rig = make_rig(num_pages=5, max_running=2)
    rig.add("one", prompt=4, max_tokens=20)
    rig.add("two", prompt=4, max_tokens=20)
    plan = rig.scheduler.schedule()
    rig.complete(plan)
    rig.add("next", adapter="a")
    assert rig.pool.num_free == 3
    assert rig.scheduler.schedule().page_ins == [], "2 of 3 pages would leave one for two who run"


def test_nothing_is_prefetched_while_someone_in_line_waits_for_pages(make_rig: Make) -> None:
    rig = make_rig(num_pages=6)
    rig.add("running", prompt=8, max_tokens=12)
    rig.step()
    rig.add("large", prompt=20, max_tokens=1)
    rig.directory.status["a"] = AdapterReady("a", 2)
    rig.add("next", adapter="a", prompt=12)
    assert rig.scheduler.schedule().page_ins == []


def test_a_kept_adapter_comes_in_and_stays_when_pages_run_short(make_rig: Make) -> None:
    rig = make_rig(num_pages=12)
    rig.scheduler.prefetcher.keep(pages_of("kept"))
    rig.step()
    rig.arrive()
    assert rig.adapters.is_resident("kept")
    rig.add("one", prompt=16, max_tokens=16)
    rig.add("two", prompt=16, max_tokens=16)
    while rig.scheduler.num_running != 2:
        rig.step()
    while rig.scheduler.has_work:
        rig.step()
        assert rig.adapters.is_resident("kept")
    assert rig.scheduler.preemptions, "who came last gave way instead"


def test_a_kept_adapter_gives_way_to_one_that_could_not_run_otherwise_and_comes_back(make_rig: Make) -> None:
    rig = make_rig(num_pages=6)
    rig.scheduler.prefetcher.keep(pages_of("kept"))
    rig.step()
    rig.arrive()
    rig.add("long", prompt=4, max_tokens=17)
    outputs = rig.drain()
    assert outputs[-1].finish_reason == "length"
    assert rig.adapters.evictions_by_reason["price"] == 1
    rig.step()
    rig.arrive()
    assert rig.adapters.kept == ("kept",)
    assert rig.scheduler.preemptions == 0


def test_a_kept_adapter_that_is_not_on_the_host_is_asked_for_until_it_is(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["kept"] = AdapterLoading()
    rig.scheduler.prefetcher.keep(pages_of("kept"))
    assert rig.scheduler.schedule().page_ins == []
    rig.directory.status["kept"] = AdapterReady("kept", 2)
    assert [page_in.identity for page_in in rig.scheduler.schedule().page_ins] == ["kept"]
    rig.arrive()
    assert not rig.directory.holds.total()


def test_an_adapter_that_was_asked_for_comes_in_once(make_rig: Make) -> None:
    rig = make_rig()
    rig.scheduler.prefetcher.ask(pages_of("a"))
    assert rig.scheduler.prefetcher.is_asked("a")
    assert [page_in.identity for page_in in rig.scheduler.schedule().page_ins] == ["a"]
    assert not rig.scheduler.prefetcher.is_asked("a")
    rig.arrive()
    rig.adapters.drop("a")
    assert rig.scheduler.schedule().page_ins == []


def test_asking_is_over_when_there_is_no_room(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("running", prompt=12, max_tokens=4)
    rig.step()
    rig.scheduler.prefetcher.ask(pages_of("a"))
    assert rig.scheduler.schedule().page_ins == []
    assert not rig.scheduler.prefetcher.is_asked("a")


def test_a_flood_of_cold_adapters_does_not_defer_one_that_is_in_the_pool(make_rig: Make) -> None:
    rig = make_rig(max_loading=2)
    rig.add("warm", adapter="warm", max_tokens=1)
    rig.drain()
    for number in range(5):
        rig.directory.status[f"cold {number}"] = AdapterLoading()
        rig.add(f"cold {number}", adapter=f"cold {number}")
    rig.step()
    rig.add("again", adapter="warm", max_tokens=1)
    assert [output.request_id for output in rig.step()] == ["again"]


def test_requests_of_another_salt_share_nothing(make_rig: Make) -> None:
    rig = make_rig()
    for salt in ("", "a", "a", "b"):
        rig.add(f"{salt}{rig.now}", prompt=list(range(9)), max_tokens=1, cache_salt=salt)
        rig.now += 1
        (output,) = rig.drain()
        assert output.cached_tokens == (8 if rig.now == 3 else 0)


def test_an_adapter_that_leaves_kv_as_it_is_shares_the_bases(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["head"] = AdapterReady("head", 2, changes_kv=False)
    rig.add("base", prompt=list(range(9)), max_tokens=1)
    rig.drain()
    for adapter, cached in (("head", 8), ("other", 0)):
        rig.add(adapter, prompt=list(range(9)), max_tokens=1, adapter=adapter)
        (output,) = rig.drain()
        assert output.cached_tokens == cached
