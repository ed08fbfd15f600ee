from __future__ import annotations

import pytest

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import ValueOrder
from loraplex.memory.page_pool import OutOfPages, PagePool


@pytest.fixture
def pool() -> PagePool:
    return PagePool(10)


@pytest.fixture
def cache(pool: PagePool) -> AdapterCache:
    return AdapterCache(pool)


def test_admission_gives_pages_once_and_then_hits(cache: AdapterCache) -> None:
    pages = cache.admit("a", 3)
    assert pages is not None
    assert len(pages) == 3
    assert cache.admit("a", 3) is None
    assert cache.pages("a") == pages
    assert (cache.loads, cache.hits, cache.evictions) == (1, 1, 0)


def test_the_least_recently_used_idle_adapter_goes_first(cache: AdapterCache) -> None:
    for name in "abc":
        cache.admit(name, 3)
    cache.admit("a", 3)
    assert cache.resident == ("b", "c", "a")
    cache.admit("d", 4)
    assert cache.resident == ("c", "a", "d")
    assert cache.evictions == 1


def test_an_unpinned_adapter_is_the_most_recently_used(cache: AdapterCache) -> None:
    for name in "abc":
        cache.admit(name, 3)
    cache.pin("a")
    cache.admit("b", 3)
    cache.unpin("a")
    assert cache.resident == ("c", "b", "a")


def test_pinned_adapters_stay(cache: AdapterCache) -> None:
    cache.admit("a", 6)
    cache.pin("a")
    assert not cache.can_admit("b", 5)
    assert cache.can_admit("a", 6)
    with pytest.raises(OutOfPages, match="adapter b needs 5 pages; 4 are free, 0 hold what is idle and 0 what is kept"):
        cache.admit("b", 5)
    cache.unpin("a")
    assert cache.can_admit("b", 5)
    cache.admit("b", 5)
    assert cache.resident == ("b",)


def test_an_admission_that_must_fail_evicts_nobody(pool: PagePool, cache: AdapterCache) -> None:
    cache.admit("a", 3)
    cache.admit("b", 7)
    cache.pin("b")
    with pytest.raises(OutOfPages):
        cache.admit("c", 4)
    assert not pool.make_room(4)
    assert cache.resident == ("a", "b")


def test_pins_are_counted(cache: AdapterCache) -> None:
    cache.admit("a", 2)
    cache.pin("a")
    cache.pin("a")
    cache.unpin("a")
    assert cache.num_evictable_pages == 0
    assert cache.pins("a") == 1
    cache.unpin("a")
    assert cache.num_evictable_pages == 2
    cache.admit("b", 3)
    assert cache.num_evictable_of(["a", "unknown"]) == 2
    assert cache.num_evictable_of("ab") == 5
    assert cache.num_evictable_of([]) == 0
    with pytest.raises(KeyError):
        cache.unpin("a")


def test_what_is_not_resident_cannot_be_pinned(cache: AdapterCache) -> None:
    with pytest.raises(KeyError):
        cache.pin("a")


def test_making_room_evicts_no_more_than_needed(pool: PagePool, cache: AdapterCache) -> None:
    for name in "abc":
        cache.admit(name, 3)
    assert pool.make_room(1)
    assert cache.evictions == 0
    assert pool.make_room(2)
    assert cache.resident == ("b", "c")
    assert pool.num_free == 4


def test_a_dropped_adapter_goes_at_its_last_unpin(pool: PagePool, cache: AdapterCache) -> None:
    cache.admit("a", 2)
    cache.admit("b", 2)
    cache.pin("a")
    cache.drop("a")
    cache.drop("b")
    cache.drop("unknown")
    assert cache.resident == ("a",)
    cache.unpin("a")
    assert not cache.is_resident("a")
    assert pool.num_free == 10
    assert cache.evictions == 0


def test_an_adapter_wanted_again_survives_its_drop(cache: AdapterCache) -> None:
    cache.admit("a", 2)
    cache.pin("a")
    cache.drop("a")
    cache.admit("a", 2)
    cache.unpin("a")
    assert cache.resident == ("a",)


def test_an_adapter_takes_one_run_where_there_is_one(pool: PagePool, cache: AdapterCache) -> None:
    pages = pool.allocate(10)
    pool.release([*pages[1:3], *pages[4:9]])
    assert cache.admit("a", 5) == pages[4:9]


def test_kept_adapters_stay_when_room_is_made_and_go_last_at_any_price(pool: PagePool, cache: AdapterCache) -> None:
    for name in "abc":
        cache.admit(name, 3)
    cache.keep("a")
    assert (cache.kept, cache.kept_pages) == (("a",), 3)
    assert (pool.num_reachable, pool.num_reachable_alone) == (7, 10)
    assert not pool.make_room(8)
    assert not cache.can_admit("d", 8)
    assert pool.make_room(2)
    assert cache.resident == ("c", "a")
    assert cache.can_admit("d", 8, at_any_price=True)
    with pytest.raises(OutOfPages, match="4 are free, 3 hold what is idle and 3 what is kept"):
        cache.admit("d", 8)
    cache.admit("d", 8, at_any_price=True)
    assert cache.resident == ("d",)
    assert (cache.kept, cache.missing_kept, cache.kept_pages) == ((), ("a",), 0)
    assert cache.evictions_by_reason == {"room": 2, "price": 1}
    assert cache.evictions == 3


def test_a_kept_adapter_that_had_to_go_is_kept_again_when_it_is_back(pool: PagePool, cache: AdapterCache) -> None:
    cache.keep("a")
    assert cache.missing_kept == ("a",)
    cache.admit("a", 4)
    assert (cache.kept, cache.missing_kept) == (("a",), ())
    assert pool.num_reachable == 6
    cache.drop("a")
    assert cache.missing_kept == ("a",)
    cache.admit("a", 4)
    cache.unkeep("a")
    cache.unkeep("unknown")
    assert (cache.kept, cache.missing_kept) == ((), ())
    assert not cache.is_kept("a")
    assert pool.num_reachable == 10
    cache.check_integrity()


def test_a_kept_adapter_in_use_is_kept_when_it_is_idle_again(pool: PagePool, cache: AdapterCache) -> None:
    cache.admit("a", 4)
    cache.pin("a")
    cache.keep("a")
    assert cache.kept_pages == 4
    assert pool.num_reachable_alone == 6
    cache.unpin("a")
    assert cache.num_evictable_pages == 0
    assert (cache.num_evictable_of("a"), cache.num_evictable_alone_of("a")) == (0, 4)
    assert (pool.num_reachable, pool.num_reachable_alone) == (6, 10)
    cache.check_integrity()


def test_changes_name_who_entered_or_left_since_they_were_last_taken(pool: PagePool, cache: AdapterCache) -> None:
    cache.admit("a", 4)
    cache.admit("b", 4)
    assert cache.take_changes() == {"a", "b"}
    cache.admit("a", 4)
    cache.pin("a")
    assert cache.take_changes() == set()
    cache.admit("c", 4)
    cache.drop("a")
    assert cache.take_changes() == {"b", "c"}
    cache.unpin("a")
    assert cache.take_changes() == {"a"}
    assert cache.evictions_by_reason == {"room": 1, "dropped": 1}


@pytest.fixture
def costs() -> dict[str, float]:
    return {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.fixture
def rates() -> ArrivalRates:
    return ArrivalRates(clock=lambda: 0.0)


@pytest.fixture
def by_value(rates: ArrivalRates, costs: dict[str, float]) -> AdapterCache:
    """Three idle adapters of 3 pages, each wanted once."""
    cache = AdapterCache(PagePool(9, order=ValueOrder()), rates, lambda identity, num_pages: costs[identity])
    for name in "abc":
        rates.note(name)
        cache.admit(name, 3)
    return cache


def test_what_is_wanted_more_often_or_costs_more_stays(
    by_value: AdapterCache, rates: ArrivalRates, costs: dict[str, float]
) -> None:
    rates.note("a")
    by_value.admit("a", 3)
    costs["b"] = 1.5
    by_value.rescore("b")
    costs["d"] = 1.0
    by_value.admit("d", 1)
    assert by_value.resident == ("b", "a", "d")
    # Never asked for, the newcomer counts as wanted once, for which it is worth three times as much a page.
    costs["e"] = 1.0
    rates.note("e")
    by_value.admit("e", 3)
    assert by_value.resident == ("a", "d", "e")


def test_what_was_fetched_beforehand_outlives_what_was_wanted_long_ago(costs: dict[str, float]) -> None:
    now = 0.0
    rates = ArrivalRates(30.0, clock=lambda: now)
    cache = AdapterCache(PagePool(6, order=ValueOrder()), rates)
    for name in "ab":
        rates.note(name)
    cache.admit("a", 3)
    now = 100.0
    cache.admit("fetched", 3)
    cache.admit("b", 3)
    assert cache.resident == ("fetched", "b")
    assert rates.log_weight("fetched") == pytest.approx(100 / 30)


def test_a_size_is_what_a_worth_is_divided_by(rates: ArrivalRates) -> None:
    cache = AdapterCache(PagePool(8, order=ValueOrder()), rates)
    for name, pages in (("small", 1), ("large", 4), ("middle", 2)):
        rates.note(name)
        cache.admit(name, pages)
    assert cache.admit("new", 2) is not None
    assert cache.resident == ("small", "middle", "new")


def test_another_cost_is_no_use_of_an_adapter(pool: PagePool, cache: AdapterCache) -> None:
    for name in "abc":
        cache.admit(name, 3)
    cache.pin("b")
    cache.keep("c")
    for name in ("a", "b", "c", "unknown"):
        cache.rescore(name)
    cache.unkeep("c")
    cache.unpin("b")
    assert pool.idle.keys == ("a", "c", "b")
    cache.check_integrity()
