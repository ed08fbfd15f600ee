from __future__ import annotations

import random
from typing import Any

import pytest

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain

TOKENS = list(range(100, 116))


def chain(tokens: list[int] = TOKENS, **options: Any) -> PageChain:
    return PageChain(lambda start, stop: tokens[start:stop], 4, **options)


def names(tokens: list[int] = TOKENS, **options: Any) -> list[bytes]:
    return [chain(tokens, **options).key(index) for index in range(4)]


def test_a_name_stands_for_all_tokens_up_to_the_end_of_its_page() -> None:
    assert len(set(names())) == 4
    changed = names([*TOKENS[:5], 0, *TOKENS[6:]])
    assert changed[0] == names()[0]
    assert not set(changed[1:]) & set(names())


def test_equal_pages_at_other_places_have_other_names() -> None:
    assert len(set(names([1, 2, 3, 4] * 4))) == 4


def test_pages_of_different_adapters_have_different_names() -> None:
    every = [names(content=content) for content in ("", "a", "b")]
    assert len({name for found in every for name in found}) == 12


def test_pages_of_different_scopes_have_different_names() -> None:
    assert not set(names(scope="request 1")) & set(names(scope="request 2"))
    assert not set(names(scope="request 1")) & set(names())


@pytest.mark.parametrize(("start", "shared"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (100, 4)])
def test_pages_before_an_adapter_acts_are_the_bases(start: int, shared: int) -> None:
    base, activated = names(), names(content="x", start=start)
    assert activated[:shared] == base[:shared]
    assert not set(activated[shared:]) & set(base)


def test_where_an_adapter_begins_within_a_page_counts() -> None:
    starts = [names(content="x", start=start) for start in range(4, 9)]
    assert len({found[0] for found in starts}) == 1
    assert len({found[1] for found in starts}) == 5


def test_a_name_is_worked_out_once() -> None:
    asked: list[tuple[int, int]] = []

    def tokens(start: int, stop: int) -> list[int]:
        asked.append((start, stop))
        return TOKENS[start:stop]

    subject = PageChain(tokens, 4)
    assert subject.key(2) == subject.key(2)
    assert subject.key(3) == names()[3]
    assert asked == [(0, 4), (4, 8), (8, 12), (12, 16)]


def test_a_fork_knows_what_the_chains_have_in_common() -> None:
    first = chain(content="x", start=3, scope="s")
    first.key(3)
    tokens = [*TOKENS[:9], *range(7)]
    fork = first.fork(lambda start, stop: tokens[start:stop], 9)
    assert fork.known == first.known[:2]
    assert [fork.key(index) for index in range(4)] == names(tokens, content="x", start=3, scope="s")


def test_a_page_that_is_not_full_has_no_name() -> None:
    with pytest.raises(AssertionError, match="page 1 is not full"):
        chain(TOKENS[:7]).key(1)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(8)


@pytest.fixture
def kv(pool: PagePool) -> KvCache:
    return KvCache(pool, page_tokens=4)


def fill(kv: KvCache, seq_id: int, tokens: list[int]) -> None:
    """A sequence that came, was cached and went."""
    kv.extend(seq_id, len(tokens))
    kv.cache(seq_id, chain(tokens), 0, len(tokens) // 4)
    kv.release(seq_id)


def test_a_match_counts_what_nobody_uses(kv: KvCache) -> None:
    fill(kv, 1, TOKENS[:12])
    short, long = chain(), chain()
    kv.begin_with(2, short, kv.match(short, 4))
    assert kv.match(long, 16) == (3, 2)
    kv.release(2)
    assert kv.match(long, 16) == (3, 3)


def test_a_match_follows_what_comes_and_goes(pool: PagePool, kv: KvCache) -> None:
    subject = chain()
    assert kv.match(subject, 16) == (0, 0)
    fill(kv, 1, TOKENS)
    assert kv.match(subject, 16) == (4, 4)
    for num_free in range(5, 9):
        pool.make_room(num_free)
        assert kv.match(subject, 16) == (8 - num_free, 8 - num_free)
    assert kv.match(subject, 16) == (0, 0)


def test_a_match_that_is_asked_for_again_looks_up_few_names(kv: KvCache) -> None:
    looked_up: list[bytes] = []

    class Counted(dict[bytes, Any]):
        def __contains__(self, key: object) -> bool:
            looked_up.append(key)  # type: ignore[arg-type]
            return super().__contains__(key)

    pool = PagePool(1024)
    kv = KvCache(pool, page_tokens=4)
    tokens = list(range(4000))
    kv.prefixes._by_key = Counted()
    fill(kv, 1, tokens)
    subject = chain(tokens)
    assert kv.match(subject, 4000).num_pages == 1000
    pool.make_room(100)
    looked_up.clear()
    assert kv.match(subject, 4000).num_pages == 924
    assert len(looked_up) < 30


def test_what_is_idle_for_longest_goes_first_and_ends_go_before_beginnings(pool: PagePool, kv: KvCache) -> None:
    adapters = AdapterCache(pool)
    fill(kv, 1, TOKENS[:8])
    adapters.admit("a", 2)
    fill(kv, 2, [0, *TOKENS[:7]])
    fill(kv, 3, TOKENS[:4])
    assert pool.num_free == 2
    seen = []
    for num_free in range(3, 9):
        assert pool.make_room(num_free)
        seen.append((kv.match(chain(), 16).num_pages, adapters.is_resident("a"), kv.match(chain([0, *TOKENS]), 16)[0]))
    # Sequence 3 has used the first page of sequence 1 last.
    assert seen == [(1, True, 2), (1, False, 2), (1, False, 2), (1, False, 1), (1, False, 0), (0, False, 0)]
    assert adapters.evictions == 1


def test_pages_in_use_are_never_put_out(pool: PagePool, kv: KvCache) -> None:
    fill(kv, 1, TOKENS)
    subject = chain()
    kv.begin_with(2, subject, kv.match(subject, 8))
    assert not pool.make_room(7)
    assert pool.make_room(6)
    assert kv.match(subject, 16) == (2, 0)


def test_clearing_forgets_all_and_is_a_fault_while_somebody_reads(pool: PagePool, kv: KvCache) -> None:
    fill(kv, 1, TOKENS)
    subject = chain()
    kv.begin_with(2, subject, kv.match(subject, 4))
    with pytest.raises(AssertionError, match="a cached page is in use"):
        kv.prefixes.clear()
    kv.release(2)
    kv.prefixes.clear()
    assert (kv.prefixes.num_pages, kv.prefixes.num_idle_pages, pool.num_free) == (0, 0, 8)
    assert kv.match(subject, 16) == (0, 0)
    kv.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_random_tokens_are_found_exactly_as_far_as_somebody_had_them(seed: int) -> None:
    rng = random.Random(seed)
    kv = KvCache(PagePool(4000), page_tokens=4)
    seen: list[list[int]] = []
    for seq_id in range(150):
        tokens = [rng.randrange(2) for _ in range(rng.randint(4, 40))]
        best = max((_common(tokens, other) for other in seen), default=0)
        subject = chain(tokens)
        limit = rng.randint(0, len(tokens))
        assert kv.match(subject, limit).num_pages == min(best, limit // 4)
        fill(kv, seq_id, tokens)
        seen.append(tokens)
    kv.check_integrity()


def _common(one: list[int], other: list[int]) -> int:
    """Full pages that two sequences have in common."""
    count = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return min(count // 4, len(one) // 4, len(other) // 4)
