from __future__ import annotations

import pytest

from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import OutOfPages, PagePool


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


def test_only_full_pages_are_shared(pool: PagePool, kv: KvCache) -> None:
    kv.extend(1, 11)
    assert kv.share_prefix(1, 2, 11) == 8
    assert kv.pages(2) == kv.pages(1)[:2]
    kv.extend(2, 11)
    assert kv.pages(2)[2] != kv.pages(1)[2]
    assert kv.num_pages == 4
    assert pool.num_free == 4
    kv.check_integrity()


def test_a_prefix_shorter_than_a_page_is_not_shared(kv: KvCache) -> None:
    kv.extend(1, 11)
    assert kv.share_prefix(1, 2, 3) == 0
    assert kv.sequences == (1,)
    kv.check_integrity()


def test_nothing_is_shared_with_an_unknown_sequence(kv: KvCache) -> None:
    assert kv.share_prefix(7, 2, 100) == 0
    assert kv.pages(2) == []


def test_sharing_into_a_sequence_that_holds_pages_is_a_fault(kv: KvCache) -> None:
    kv.extend(1, 4)
    kv.extend(2, 4)
    with pytest.raises(AssertionError, match="already holds pages"):
        kv.share_prefix(1, 2, 4)


def test_shared_pages_outlive_their_first_owner(pool: PagePool, kv: KvCache) -> None:
    kv.extend(1, 8)
    kv.share_prefix(1, 2, 8)
    kv.release(1)
    assert (kv.num_pages, pool.num_free) == (2, 6)
    kv.check_integrity()
    kv.release(2)
    kv.release(2)
    assert (kv.num_pages, pool.num_free) == (0, 8)
