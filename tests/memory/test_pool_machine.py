"""Adapters, K/V and cached prefixes in one pool, under both orders of eviction, beside a plain model of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.arrival_rates import ArrivalRates, worth_of
from loraplex.memory.eviction_order import EvictionOrder, LruOrder, ValueOrder
from loraplex.memory.integrity import check_pool
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import OutOfPages, PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixCache


class MemoryMachine(RuleBasedStateMachine):
    """Released pages are poisoned, and owners write on their pages what they hold.

    Sequences 0 to 7 begin alike for 8, 16 or 24 tokens; some are under an adapter, from their start or from a later
    token, and some under a salt.
    """

    make_order: ClassVar[type[LruOrder | ValueOrder]] = LruOrder
    SIZES: ClassVar = {"a": 1, "b": 3, "c": 5, "d": 8, "e": 13}
    KINDS: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {},
        {},
        {"content": "a"},
        {"scope": "tenant"},
        {"content": "a", "start": 9},
        {"content": "a", "scope": "tenant"},
        {"content": "b"},
    )
    names = st.sampled_from(sorted(SIZES))
    seq_ids = st.integers(0, 7)
    seconds = st.sampled_from([1e-6, 0.01, 0.1, 1.0, 50.0])

    def __init__(self) -> None:
        super().__init__()
        self.now, self.page_seconds = 0.0, 0.1
        self.costs = dict.fromkeys(self.SIZES, 1.0)
        self.content: dict[int, object] = {}
        order: EvictionOrder = self.make_order()
        self.pool = PagePool(24, on_release=self.poison, order=order)
        self.rates = ArrivalRates(10.0, clock=lambda: self.now)
        prefixes = PrefixCache(self.pool, self.rates, lambda: self.page_seconds)
        self.kv = KvCache(self.pool, 4, prefixes)
        self.cache = AdapterCache(self.pool, self.rates, lambda identity, num_pages: self.costs[identity])
        self.pins: Counter[str] = Counter()
        self.dropped: set[str] = set()
        self.kept: set[str] = set()
        self.resident: set[str] = set()
        self.chains = {at: PageChain(partial(self.tokens, at), 4, **kind) for at, kind in enumerate(self.KINDS)}

    @staticmethod
    def tokens(seq_id: int, start: int, stop: int) -> list[int]:
        return [at if at < 8 + 8 * (seq_id % 3) else 100 * seq_id + at for at in range(start, stop)]

    def beginning(self, seq_id: int, index: int) -> Hashable:
        """What page ``index`` of a sequence holds: its tokens, all before them, and what they were computed under."""
        end, kind = 4 * index + 4, self.KINDS[seq_id]
        start = kind.get("start", 0)
        acting = (kind["content"], start) if "content" in kind and end > start else None
        return tuple(self.tokens(seq_id, 0, end)), acting, kind.get("scope", "")

    def poison(self, pages: list[int]) -> None:
        for page in pages:
            self.content[page] = float("nan")

    @rule(name=names, at_any_price=st.booleans())
    def admit(self, name: str, at_any_price: bool) -> None:
        possible = self.cache.can_admit(name, self.SIZES[name], at_any_price=at_any_price)
        resident = self.cache.is_resident(name)
        if not possible:
            before = self.cache.resident
            with pytest.raises(OutOfPages):
                self.cache.admit(name, self.SIZES[name], at_any_price=at_any_price)
            assert self.cache.resident == before
            return
        pages = self.cache.admit(name, self.SIZES[name], at_any_price=at_any_price)
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

    @rule(name=names)
    def keep_or_not(self, name: str) -> None:
        (self.cache.unkeep if name in self.kept else self.cache.keep)(name)
        self.kept ^= {name}

    @rule(name=names, seconds=seconds)
    def rescore(self, name: str, seconds: float) -> None:
        before = self.pool.idle.keys
        self.costs[name] = seconds
        self.cache.rescore(name)
        if self.make_order is LruOrder:
            assert self.pool.idle.keys == before

    @rule(name=names, gap=st.floats(0, 30), seconds=seconds)
    def time_goes_by(self, name: str, gap: float, seconds: float) -> None:
        self.now += gap
        self.page_seconds = seconds
        self.rates.note(name)

    @rule(count=st.integers(0, 25), at_any_price=st.booleans())
    def make_room(self, count: int, at_any_price: bool) -> None:
        pool, before = self.pool, self.pool.idle.keys
        kept_before, free = self.pool.kept.keys, self.pool.num_free
        reachable = pool.num_reachable_alone if at_any_price else pool.num_reachable
        assert pool.make_room(count, at_any_price=at_any_price) == (count <= reachable)
        gone = len(before) - len(pool.idle.keys)
        assert pool.idle.keys == before[gone:]
        kept_gone = len(kept_before) - len(pool.kept.keys)
        assert pool.kept.keys == kept_before[kept_gone:]
        assert not kept_gone or (at_any_price and gone == len(before))
        if count > reachable or count <= free:
            assert not gone
            assert not kept_gone
        else:
            last = (kept_before[:kept_gone] or before[:gone])[-1]
            assert count <= pool.num_free < count + self.SIZES.get(str(last), 1), "more was put out than was needed"

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
        known = {self.content[page] for page in self.kv.prefixes.pages}
        held = [self.beginning(seq_id, index) in known for index in range(num_tokens // 4)]
        assert found.num_pages == next((at for at, here in enumerate(held) if not here), len(held))
        if self.kv.pages(seq_id):
            return
        before, hits = self.kv.prefixes.num_idle_pages, self.kv.prefixes.hit_pages
        assert self.kv.begin_with(seq_id, self.chains[seq_id], found) == 4 * found.num_pages
        assert self.kv.prefixes.num_idle_pages == before - found.num_idle
        assert self.kv.prefixes.hit_pages == hits + found.num_pages

    @rule(seq_id=seq_ids, num_tokens=st.integers(8, 40))
    def serve(self, seq_id: int, num_tokens: int) -> None:
        """All that a prompt does at once."""
        if not self.kv.pages(seq_id):
            self.begin(seq_id, num_tokens)
            self.extend(seq_id, num_tokens)
            self.cache_pages(seq_id)

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
        check_pool(self.pool, self.kv, self.cache)
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
        cached = [self.content[page] for page in self.kv.prefixes.pages]
        assert len(set(cached)) == len(cached), "the same content is cached twice"

    @invariant()
    def what_an_operator_keeps_is_told_and_goes_last(self) -> None:
        resident = set(self.cache.resident)
        assert set(self.cache.kept) == self.kept & resident
        assert set(self.cache.missing_kept) == self.kept - resident
        assert self.cache.kept_pages == sum(self.SIZES[name] for name in self.kept & resident)
        idle = {name for name in resident if not self.pins[name]}
        assert set(self.pool.kept.keys) == self.kept & idle
        assert self.cache.num_evictable_of("abcde") == sum(self.SIZES[name] for name in idle - self.kept)
        assert self.cache.num_evictable_alone_of("abcde") == sum(self.SIZES[name] for name in idle)

    @invariant()
    def who_came_and_went_is_told(self) -> None:
        resident = set(self.cache.resident)
        assert self.cache.take_changes() == self.resident ^ resident
        self.resident = resident
        assert self.cache.loads - self.cache.evictions_by_reason.total() == len(resident)

    def teardown(self) -> None:
        for seq_id in self.kv.sequences:
            self.kv.release(seq_id)
        for name in self.pins.elements():
            self.cache.unpin(name)
        for name in self.SIZES:
            self.cache.drop(name)
        self.kv.prefixes.clear()
        assert self.pool.num_free == self.pool.num_pages


class ByWorthMachine(MemoryMachine):
    """The same under the other order."""

    make_order = ValueOrder

    @invariant()
    def nothing_is_put_out_before_what_is_worth_less(self) -> None:
        order = self.pool.idle
        assert isinstance(order, ValueOrder)
        worths = [order._things[key][2] for key in order.keys]
        assert worths == sorted(worths)
        for name in set(self.SIZES) & set(order.keys):
            most = worth_of(self.costs[name], self.rates.log_weight(name), self.SIZES[name])
            assert order._things[name][2] <= most


TestMemoryUnderLru = MemoryMachine.TestCase
TestMemoryUnderLru.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMemoryByWorth = ByWorthMachine.TestCase
TestMemoryByWorth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
