"""The proof that every page of the pool has the owners that it is counted for, at any time."""

from __future__ import annotations

from collections import Counter

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool


def check_pool(pool: PagePool, kv: KvCache, adapters: AdapterCache) -> None:
    """AssertionError unless each page has one owner or is shared by reference, and free + owned + cached = all.

    Owners are the sequences, the prefix cache and the adapters, and nobody else. Costs time in proportion to the pool
    and to the page lists of the sequences.
    """
    for owner in (pool, kv, adapters):
        owner.check_integrity()
    in_use = Counter(page for seq_id in kv.sequences for page in kv.pages(seq_id))
    cached = set(kv.prefixes.pages)
    of_adapters = {page for identity in adapters.resident for page in adapters.pages(identity)}
    assert not of_adapters & (in_use.keys() | cached), "a page holds both K/V and an adapter"
    free = set(pool.free_pages())
    for page in range(pool.num_pages):
        owners = in_use[page] + (page in cached) + (page in of_adapters)
        assert pool.refcount(page) == owners, f"page {page} has {owners} owners and a count of {pool.refcount(page)}"
        assert (page in free) == (owners == 0), f"page {page} is free and owned, or neither"
    num_owned = len(in_use.keys() | of_adapters)
    assert num_owned == kv.num_pages + adapters.num_pages
    num_cached = len(cached - in_use.keys())
    assert num_cached == kv.prefixes.num_idle_pages
    assert pool.num_free + num_owned + num_cached == pool.num_pages, "free + owned + cached is not all"
    assert pool.idle.size == num_cached + adapters.num_evictable_pages, "something idle is not in the order"
    idle = [identity for identity in adapters.resident if not adapters.pins(identity)]
    assert pool.kept.size == adapters.num_evictable_alone_of(idle) - adapters.num_evictable_of(idle)
    assert pool.num_reachable_alone == pool.num_free + num_cached + adapters.num_evictable_alone_of(idle)
