"""Cached pages under the order by worth: nothing goes before what is found through it, whatever costs and time do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.memory.arrival_rates import ArrivalRates, worth_of
from loraplex.memory.eviction_order import Evictable, ValueOrder
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixCache


class RecordedOrder(ValueOrder):
    """An order by worth that can be asked what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.worth: dict[Hashable, float] = {}

    def add(self, key: Hashable, size: int, owner: Evictable, worth: float) -> None:
        super().add(key, size, owner, worth)
        self.worth[key] = worth


class Rig:
    """A pool of 16 pages of 2 tokens, a clock, and what it takes to compute a page."""

    def __init__(self) -> None:
        self.now, self.page_seconds = 0.0, 1.0
        self.order = RecordedOrder()
        self.pool = PagePool(16, order=self.order)
        rates = ArrivalRates(10.0, clock=lambda: self.now)
        self.prefixes = PrefixCache(self.pool, rates, lambda: self.page_seconds)
        self.kv = KvCache(self.pool, 2, self.prefixes)

    @staticmethod
    def chain(branch: str) -> PageChain:
        """A path of a binary tree whose nodes are pages."""
        tokens = [ord(letter) for letter in branch for _ in range(2)]
        return PageChain(lambda start, stop: tokens[start:stop], 2)

    def begin(self, seq_id: int, branch: str) -> bool:
        """Let a sequence have all pages of a branch, cached; False where there is no room."""
        chain = self.chain(branch)
        found = self.kv.match(chain, 2 * len(branch))
        if len(branch) - found.num_pages > self.pool.num_reachable - found.num_idle:
            return False
        self.kv.begin_with(seq_id, chain, found)
        assert self.pool.make_room(self.kv.missing_pages(seq_id, 2 * len(branch)))
        self.kv.extend(seq_id, 2 * len(branch))
        self.kv.cache(seq_id, chain, 0, len(branch))
        return True

    def found(self, branch: str) -> int:
        return self.kv.match(self.chain(branch), 2 * len(branch)).num_pages


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_page_is_worth_as_much_as_one_found_through_it(rig: Rig) -> None:
    rig.begin(1, "ab")
    rig.begin(2, "a")
    rig.page_seconds = 100.0
    rig.kv.release(1)
    rig.page_seconds = 0.01
    rig.kv.release(2)
    assert rig.order.worth[rig.chain("a").key(0)] == rig.order.worth[rig.order.keys[0]]
    rig.begin(3, "z")
    rig.page_seconds = 1.0
    rig.kv.release(3)
    assert rig.pool.make_room(14)
    assert (rig.found("z"), rig.found("ab")) == (0, 2)
    assert rig.pool.make_room(15)
    assert rig.found("ab") == 1


def test_what_nothing_is_found_through_any_more_is_worth_its_own(rig: Rig) -> None:
    rig.begin(1, "ab")
    rig.page_seconds = 100.0
    rig.kv.release(1)
    assert rig.pool.make_room(15)
    rig.begin(2, "a")
    rig.page_seconds = 0.01
    rig.kv.release(2)
    cached = rig.prefixes._by_key[rig.chain("a").key(0)]
    assert rig.order.worth[cached.key] == worth_of(0.01, cached.log_weight, 1)


def test_a_sibling_that_is_used_again_leaves_a_page_worth_as_much_as_the_other(rig: Rig) -> None:
    rig.begin(1, "ab")
    rig.begin(2, "ac")
    rig.page_seconds = 100.0
    rig.kv.release(1)
    rig.page_seconds = 0.01
    rig.kv.release(2)
    rig.begin(3, "ac")
    rig.kv.release(3)
    of_page = {branch: rig.order.worth[rig.chain(branch).key(len(branch) - 1)] for branch in ("a", "ab", "ac")}
    assert of_page["a"] == of_page["ab"] > of_page["ac"]
    rig.kv.check_integrity()


def test_pages_that_sequences_take_more_often_stay_longer(rig: Rig) -> None:
    for seq_id, branch in enumerate(["ab", "cd", "ab"]):
        rig.begin(seq_id, branch)
        rig.kv.release(seq_id)
    rig.begin(9, "cd")
    rig.begin(8, "ab")
    for seq_id in (8, 9):
        rig.kv.release(seq_id)
    assert rig.pool.make_room(14)
    assert (rig.found("ab"), rig.found("cd")) == (2, 0)
    assert rig.prefixes.hit_pages == 6
    assert rig.prefixes.evicted_pages == {"room": 2}


def test_pages_computed_twice_count_as_wanted_twice(rig: Rig) -> None:
    for seq_id in (1, 2):
        rig.kv.extend(seq_id, 2)
    for seq_id in (1, 2):
        rig.kv.cache(seq_id, rig.chain("a"), 0, 1)
        rig.kv.cache(seq_id, rig.chain("a"), 0, 1)
    cached = rig.prefixes._by_key[rig.chain("a").key(0)]
    assert cached.log_weight == pytest.approx(0.6931, abs=1e-4)


def test_a_page_stays_when_it_is_dropped_but_another_is_found_through_it(rig: Rig) -> None:
    rig.begin(1, "ab")
    rig.begin(2, "ac")
    rig.kv.release(1)
    rig.kv.release(2, keep=False)
    assert (rig.found("ab"), rig.found("ac")) == (2, 1)
    rig.kv.check_integrity()
    rig.prefixes.clear()
    assert rig.prefixes.evicted_pages == {"dropped": 1, "cleared": 2}


class PrefixMachine(RuleBasedStateMachine):
    """Branches of a binary tree, of up to 5 pages, by 6 sequences."""

    seq_ids = st.integers(0, 5)
    branches = st.text("ab", min_size=1, max_size=5)

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.own_worth: dict[bytes, float] = {}
        self.worths_behind: defaultdict[bytes, set[float]] = defaultdict(set)

    @rule(seq_id=seq_ids, branch=branches)
    def begin(self, seq_id: int, branch: str) -> None:
        if not self.rig.kv.pages(seq_id) and self.rig.begin(seq_id, branch):
            assert self.rig.found(branch) == len(branch)
            assert len(self.rig.kv.pages(seq_id)) == len(branch)

    @rule(seq_id=seq_ids, keep=st.sampled_from([True, True, True, False]))
    def release(self, seq_id: int, keep: bool) -> None:
        rig = self.rig
        idle_before = set(rig.order.keys)
        rig.kv.release(seq_id, keep=keep)
        for key in set(rig.order.keys) - idle_before:
            assert isinstance(key, bytes)
            cached = rig.prefixes._by_key[key]
            self.own_worth[key] = worth_of(rig.page_seconds, cached.log_weight, 1)
            if cached.before is not None:
                self.worths_behind[cached.before.key].add(rig.order.worth[key])

    @rule(gap=st.floats(0, 30), seconds=st.sampled_from([1e-6, 0.1, 1.0, 100.0]))
    def time_goes_by(self, gap: float, seconds: float) -> None:
        self.rig.now += gap
        self.rig.page_seconds = seconds

    @rule(count=st.integers(0, 16))
    def make_room(self, count: int) -> None:
        pool, before = self.rig.pool, self.rig.order.keys
        free, reachable = pool.num_free, pool.num_reachable
        assert pool.make_room(count) == (count <= reachable)
        gone = max(0, count - free) if count <= reachable else 0
        assert self.rig.order.keys == before[gone:]

    @invariant()
    def no_page_goes_before_one_that_is_found_through_it(self) -> None:
        rig = self.rig
        rig.pool.check_integrity()
        rig.kv.check_integrity()
        for key, cached in rig.prefixes._by_key.items():
            if cached.idle:
                worth = rig.order.worth[key]
                assert worth == self.own_worth[key] or worth in self.worths_behind[key]
                assert worth >= self.own_worth[key]
                if cached.before is not None and cached.before.idle:
                    assert rig.order.worth[cached.before.key] >= worth
            if not cached.num_idle_behind:
                assert cached.floor == float("-inf")

    def teardown(self) -> None:
        for seq_id in self.rig.kv.sequences:
            self.rig.kv.release(seq_id)
        assert self.rig.pool.make_room(16)
        assert self.rig.prefixes.num_pages == 0


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
