from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory.eviction_order import ValueOrder
from loraplex.memory.page_pool import OutOfPages, PagePool


def test_a_fresh_pool_is_one_run() -> None:
    pool = PagePool(10)
    assert pool.allocate(10) == list(range(10))
    assert pool.num_free == 0


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 page"):
        PagePool(0)


def test_asking_for_too_many_changes_nothing() -> None:
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 of 4 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_asking_for_nothing_gives_nothing() -> None:
    pool = PagePool(1)
    assert pool.allocate(0) == pool.allocate(0, contiguous=True) == []
    pool.check_integrity()


def test_a_page_is_free_when_its_last_owner_lets_go() -> None:
    freed: list[int] = []
    pool = PagePool(4, on_release=freed.extend)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    assert pool.release(pages) == 1
    assert freed == pages[1:]
    assert pool.refcount(pages[0]) == 1
    assert pool.release(pages[:1]) == 1
    assert freed == [pages[1], pages[0]]
    assert pool.num_free == 4
    pool.check_integrity()


@pytest.mark.parametrize("verb", ["retain", "release"])
def test_a_free_page_has_no_owner_to_count(verb: str) -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="page 1 is free"):
        getattr(pool, verb)([1])


def test_single_pages_use_up_short_runs_and_leave_the_long_one() -> None:
    pool = PagePool(64)
    pages = pool.allocate(64)
    pool.release([3, 7, *range(20, 52)])
    assert sorted(pool.allocate(2)) == [3, 7]
    assert pool.allocate(32, contiguous=True) == pages[20:52]


def test_a_contiguous_request_takes_the_run_that_it_fits_best() -> None:
    pool = PagePool(64)
    pool.allocate(64)
    pool.release([*range(5), *range(10, 40)])
    assert pool.allocate(5, contiguous=True) == [0, 1, 2, 3, 4]
    assert pool.allocate(5, contiguous=True) == [35, 36, 37, 38, 39]


def test_a_contiguous_request_without_a_run_gets_few_ascending_ones() -> None:
    pool = PagePool(16)
    pool.allocate(16)
    pool.release([0, 1, 2, 3, 6, 8, 9, 10, 11, 12, 15])
    assert pool.allocate(9, contiguous=True) == [8, 9, 10, 11, 12, 0, 1, 2, 3]
    pool.check_integrity()


def test_freed_neighbours_join_into_one_run() -> None:
    pool = PagePool(9)
    pool.allocate(9)
    for page in (1, 3, 2, 0, 8, 6, 7, 5, 4):
        pool.release([page])
        pool.check_integrity()
    assert pool.allocate(9, contiguous=True) == list(range(9))


class Holder:
    """An owner of pages that could go."""

    def __init__(self, pool: PagePool, **sizes: int) -> None:
        self.pool = pool
        self.pages = {name: pool.allocate(size) for name, size in sizes.items()}

    def put_out(self, key: Hashable) -> None:
        assert isinstance(key, str)
        self.pool.release(self.pages.pop(key))


def test_room_is_made_of_what_is_idle_and_at_any_price_of_what_is_kept() -> None:
    pool = PagePool(12)
    holder = Holder(pool, a=2, b=3, c=4, used=1)
    for name, order in (("a", pool.kept), ("b", pool.idle), ("c", pool.idle)):
        order.add(name, len(holder.pages[name]), holder, 0.0)
    assert (pool.num_free, pool.num_reachable, pool.num_reachable_alone) == (2, 9, 11)
    assert not pool.make_room(10)
    assert not pool.make_room(12, at_any_price=True)
    assert set(holder.pages) == {"a", "b", "c", "used"}
    assert pool.make_room(3, at_any_price=True)
    assert set(holder.pages) == {"a", "c", "used"}
    assert pool.make_room(10, at_any_price=True)
    assert set(holder.pages) == {"used"}
    pool.check_integrity()


def test_the_order_that_a_pool_is_given_says_what_goes_first() -> None:
    pool = PagePool(4, order=ValueOrder())
    holder = Holder(pool, a=2, b=2)
    pool.idle.add("a", 2, holder, 5.0)
    pool.idle.add("b", 2, holder, 1.0)
    assert pool.make_room(1)
    assert set(holder.pages) == {"a"}


def test_the_free_pages_are_those_without_an_owner() -> None:
    pool = PagePool(8)
    pages = pool.allocate(8)
    pool.release(pages[1:4])
    pool.release(pages[6:7])
    assert sorted(pool.free_pages()) == [1, 2, 3, 6]


class PagePoolMachine(RuleBasedStateMachine):
    """The pool against a plain dictionary of counts."""

    SIZE = 37

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[int] = []
        self.pool = PagePool(self.SIZE, on_release=self.freed.extend)
        self.counts = dict.fromkeys(range(self.SIZE), 0)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, SIZE + 1), contiguous=st.booleans())
    def allocate(self, count: int, contiguous: bool) -> None:
        free = {page for page, users in self.counts.items() if not users}
        assert self.pool.can_allocate(count) == (count <= len(free))
        if count > len(free):
            with pytest.raises(OutOfPages):
                self.pool.allocate(count, contiguous=contiguous)
            return
        pages = self.pool.allocate(count, contiguous=contiguous)
        assert len(pages) == len(set(pages)) == count
        assert set(pages) <= free
        for page in pages:
            self.counts[page] = 1
        if pages:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain_some(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        some = data.draw(st.lists(st.sampled_from(pages), min_size=1, unique=True))
        self.pool.retain(some)
        for page in some:
            self.counts[page] += 1
        self.held.append(some)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_some(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        some = data.draw(st.permutations(pages))[: data.draw(st.integers(1, len(pages)))]
        self.freed.clear()
        freed = self.pool.release(some)
        for page in some:
            self.counts[page] -= 1
        assert sorted(self.freed) == sorted(page for page in some if not self.counts[page])
        assert freed == len(self.freed)
        if rest := [page for page in pages if page not in some]:
            self.held.append(rest)

    @invariant()
    def pool_agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert {page: self.pool.refcount(page) for page in range(self.SIZE)} == self.counts
        assert self.pool.num_free == sum(not users for users in self.counts.values())

    def teardown(self) -> None:
        for pages in self.held:
            self.pool.release(pages)
        assert self.pool.allocate(self.SIZE, contiguous=True) == list(range(self.SIZE))


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
