from __future__ import annotations

from typing import Any

import pytest

from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import OutOfPages, PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixMatch


@pytest.fixture
def pool() -> PagePool:
    return PagePool(8)


@pytest.fixture
def kv(pool: PagePool) -> KvCache:
    return KvCache(pool, page_tokens=4)


def test_a_page_without_tokens_is_refused(pool: PagePool) -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        KvCache(pool, page_tokens=0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_are_rounded_up(kv: KvCache, tokens: int, pages: int) -> None:
    assert kv.pages_for(tokens) == pages


def test_a_sequence_grows_in_place(kv: KvCache) -> None:
    kv.extend(1, 3)
    pages = kv.pages(1)
    assert kv.missing_pages(1, 4) == 0
    assert kv.missing_pages(1, 9) == 2
    kv.extend(1, 9)
    assert kv.pages(1) is pages
    assert len(pages) == 3
    kv.extend(1, 2)
    assert len(pages) == 3
    kv.check_integrity()


def test_extending_beyond_the_pool_changes_nothing(pool: PagePool, kv: KvCache) -> None:
    kv.extend(1, 20)
    before = list(kv.pages(1))
    with pytest.raises(OutOfPages):
        kv.extend(1, 40)
    with pytest.raises(OutOfPages):
        kv.extend(2, 16)
    assert kv.pages(1) == before
    assert kv.sequences == (1,)
    assert pool.num_free == 3
    kv.check_integrity()


def chain(*tokens: int, **options: Any) -> PageChain:
    return PageChain(lambda start, stop: list(tokens[start:stop]), 4, **options)


def test_a_sequence_begins_with_cached_pages_and_goes_on_with_its_own(pool: PagePool, kv: KvCache) -> None:
    tokens = chain(*range(12))
    kv.extend(1, 11)
    kv.cache(1, tokens, 0, 2)
    found = kv.match(tokens, 11)
    assert found == (2, 0)
    assert kv.begin_with(2, tokens, found) == 8
    assert kv.pages(2) == kv.pages(1)[:2]
    kv.extend(2, 11)
    assert kv.pages(2)[2] != kv.pages(1)[2]
    assert kv.num_pages == 4
    assert pool.num_free == 4
    kv.check_integrity()


def test_only_full_pages_within_the_limit_are_matched(kv: KvCache) -> None:
    tokens = chain(*range(12))
    kv.extend(1, 12)
    kv.cache(1, tokens, 0, 3)
    assert [kv.match(tokens, limit).num_pages for limit in (0, 3, 4, 7, 8, 12)] == [0, 0, 1, 1, 2, 3]


def test_a_sequence_without_a_match_holds_nothing(kv: KvCache) -> None:
    tokens = chain(*range(12))
    assert kv.begin_with(2, tokens, kv.match(tokens, 12)) == 0
    assert kv.pages(2) == []
    assert kv.sequences == ()
    kv.check_integrity()


def test_beginning_a_sequence_that_holds_pages_is_a_fault(kv: KvCache) -> None:
    kv.extend(1, 4)
    with pytest.raises(AssertionError, match="already holds pages"):
        kv.begin_with(1, chain(1), PrefixMatch())


def test_shared_pages_outlive_their_first_owner_and_cached_ones_the_last(pool: PagePool, kv: KvCache) -> None:
    tokens = chain(*range(8))
    kv.extend(1, 8)
    kv.cache(1, tokens, 0, 1)
    kv.begin_with(2, tokens, kv.match(tokens, 8))
    kv.release(1)
    assert (kv.num_pages, kv.prefixes.num_idle_pages, pool.num_free) == (1, 0, 7)
    kv.check_integrity()
    kv.release(2)
    kv.release(2)
    assert (kv.num_pages, kv.prefixes.num_idle_pages, pool.num_free) == (0, 1, 7)
    kv.check_integrity()
    assert pool.make_room(8)
    kv.check_integrity()


def test_pages_that_are_not_to_be_kept_go_with_their_last_user(pool: PagePool, kv: KvCache) -> None:
    tokens = chain(*range(8))
    kv.extend(1, 8)
    kv.cache(1, tokens, 0, 2)
    kv.begin_with(2, tokens, kv.match(tokens, 8))
    kv.release(1, keep=False)
    assert kv.match(tokens, 8) == (2, 0)
    kv.release(2, keep=False)
    assert kv.match(tokens, 8) == (0, 0)
    assert pool.num_free == 8
    kv.check_integrity()


def test_pages_computed_twice_become_one() -> None:
    freed: list[int] = []
    pool = PagePool(8, on_release=freed.extend)
    kv = KvCache(pool, page_tokens=4)
    for seq_id in (1, 2):
        kv.extend(seq_id, 10)
    own = list(kv.pages(2))
    for seq_id in (1, 2):
        kv.cache(seq_id, chain(*range(8)), 0, 2)
    assert kv.pages(2) == [*kv.pages(1)[:2], own[2]]
    assert freed == own[:2]
    assert (kv.num_pages, pool.num_free) == (4, 4)
    kv.check_integrity()
    kv.release(1)
    assert kv.prefixes.num_idle_pages == 0
    kv.check_integrity()
    kv.release(2)
    assert kv.prefixes.num_idle_pages == 2


def test_a_page_that_only_the_cache_holds_is_not_poisoned() -> None:
    freed: list[int] = []
    pool = PagePool(8, on_release=freed.extend)
    kv = KvCache(pool, page_tokens=4)
    kv.extend(1, 8)
    pages = list(kv.pages(1))
    kv.cache(1, chain(*range(4)), 0, 1)
    kv.release(1)
    assert freed == pages[1:]
    kv.prefixes.clear()
    assert freed == [pages[1], pages[0]]
