from __future__ import annotations

from collections import Counter
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import OutOfPages, PagePool
from loraplex.memory.prefix_cache import PageChain


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
    with pytest.raises(OutOfPages, match="adapter b needs 5 pages; 4 are free and 0 hold what is idle"):
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


class MemoryMachine(RuleBasedStateMachine):
    """Adapters and K/V in one pool, whose released pages are poisoned and whose owners write on them what they hold.

    Sequences 0 to 5 begin alike for 8, 16 or 24 tokens.
    """

    SIZES: ClassVar = {"a": 1, "b": 3, "c": 5, "d": 8, "e": 13}
    names = st.sampled_from(sorted(SIZES))
    seq_ids = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.content: dict[int, object] = {}
        self.pool = PagePool(20, on_release=self.poison)
        self.kv = KvCache(self.pool, page_tokens=4)
        self.cache = AdapterCache(self.pool)
        self.pins: Counter[str] = Counter()
        self.dropped: set[str] = set()
        self.chains = {seq_id: PageChain(partial(self.tokens, seq_id), 4) for seq_id in range(6)}

    @staticmethod
    def tokens(seq_id: int, start: int, stop: int) -> list[int]:
        return [at if at < 8 + 8 * (seq_id % 3) else 100 * seq_id + at for at in range(start, stop)]

    def beginning(self, seq_id: int, index: int) -> tuple[int, ...]:
        """What page ``index`` of a sequence holds: its tokens and all before them."""
        return tuple(self.tokens(seq_id, 0, 4 * index + 4))

    def poison(self, pages: list[int]) -> None:
        for page in pages:
            self.content[page] = float("nan")

    @rule(name=names)
    def admit(self, name: str) -> None:
        possible = self.cache.can_admit(name, self.SIZES[name])
        resident = self.cache.is_resident(name)
        if not possible:
            before = self.cache.resident
            with pytest.raises(OutOfPages):
                self.cache.admit(name, self.SIZES[name])
            assert self.cache.resident == before
            return
        pages = self.cache.admit(name, self.SIZES[name])
        assert (pages is None) == resident
        self.dropped.discard(name)
        for at, page in enumerate(pages or ()):
            self.content[page] = (name, at)

    @rule(name=names)
    def pin(self, name: str) -> None:
        if self.cache.is_resident(name):
            self.cache.pin(name)
            self.pins[name] += 1

    @rule(name=names)
    def unpin(self, name: str) -> None:
        if self.pins[name]:
            self.cache.unpin(name)
            self.pins[name] -= 1
            if name in self.dropped and not self.pins[name]:
                assert not self.cache.is_resident(name)

    @rule(name=names)
    def drop(self, name: str) -> None:
        self.cache.drop(name)
        assert self.cache.is_resident(name) == (self.pins[name] > 0)
        self.dropped.add(name)

    @rule(count=st.integers(0, 21))
    def make_room(self, count: int) -> None:
        idle = self.cache.num_evictable_pages + self.kv.prefixes.num_idle_pages
        assert self.pool.num_reachable == self.pool.num_free + idle
        assert self.pool.make_room(count) == (count <= self.pool.num_free + idle)
        assert count > self.pool.num_reachable or self.pool.can_allocate(count)

    @rule(seq_id=seq_ids, num_tokens=st.integers(0, 40))
    def extend(self, seq_id: int, num_tokens: int) -> None:
        missing = self.kv.missing_pages(seq_id, num_tokens)
        before = list(self.kv.pages(seq_id))
        if not self.pool.make_room(missing):
            with pytest.raises(OutOfPages):
                self.kv.extend(seq_id, num_tokens)
            assert self.kv.pages(seq_id) == before
            return
        self.kv.extend(seq_id, num_tokens)
        assert self.kv.pages(seq_id)[: len(before)] == before
        for index, page in enumerate(self.kv.pages(seq_id)):
            if index >= len(before):
                self.content[page] = self.beginning(seq_id, index)

    @rule(seq_id=seq_ids)
    def cache_pages(self, seq_id: int) -> None:
        if pages := self.kv.pages(seq_id):
            self.kv.cache(seq_id, self.chains[seq_id], 0, len(pages))

    @rule(seq_id=seq_ids, num_tokens=st.integers(0, 40))
    def begin(self, seq_id: int, num_tokens: int) -> None:
        found = self.kv.match(self.chains[seq_id], num_tokens)
        assert 0 <= found.num_idle <= found.num_pages <= num_tokens // 4
        if self.kv.pages(seq_id):
            return
        before = self.kv.prefixes.num_idle_pages
        assert self.kv.begin_with(seq_id, self.chains[seq_id], found) == 4 * found.num_pages
        assert self.kv.prefixes.num_idle_pages == before - found.num_idle

    @precondition(lambda self: not self.kv.sequences)
    @rule()
    def clear(self) -> None:
        self.kv.prefixes.clear()
        assert self.kv.prefixes.num_pages == 0

    @rule(seq_id=seq_ids, keep=st.booleans())
    def release(self, seq_id: int, keep: bool) -> None:
        self.kv.release(seq_id, keep=keep)
        assert self.kv.pages(seq_id) == []

    @invariant()
    def every_page_has_the_owner_that_it_should(self) -> None:
        for owner in (self.pool, self.kv, self.cache):
            owner.check_integrity()
        owned = self.kv.num_pages + self.kv.prefixes.num_idle_pages + self.cache.num_pages
        assert self.pool.num_free + owned == self.pool.num_pages
        assert all(self.cache.is_resident(name) for name, pins in self.pins.items() if pins)
        assert all(self.cache.pins(name) == pins for name, pins in self.pins.items())

    @invariant()
    def nobody_reads_what_was_released(self) -> None:
        for name in self.cache.resident:
            assert [self.content[page] for page in self.cache.pages(name)] == [
                (name, at) for at in range(self.SIZES[name])
            ]
        for seq_id in self.kv.sequences:
            for index, page in enumerate(self.kv.pages(seq_id)):
                assert self.content[page] == self.beginning(seq_id, index)

    def teardown(self) -> None:
        for seq_id in self.kv.sequences:
            self.kv.release(seq_id)
        for name in self.pins.elements():
            self.cache.unpin(name)
        for name in self.SIZES:
            self.cache.drop(name)
        self.kv.prefixes.clear()
        assert self.pool.num_free == self.pool.num_pages


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
