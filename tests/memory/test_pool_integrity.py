from __future__ import annotations

from collections.abc import Callable

import pytest

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.integrity import check_pool
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain


class Memory:
    """A pool with something of every sort: pages free, in use, shared and cached; adapters in use, idle and kept."""

    def __init__(self) -> None:
        self.pool = PagePool(24)
        self.kv, self.adapters = KvCache(self.pool, 4), AdapterCache(self.pool)
        tokens = list(range(12))
        chain = PageChain(lambda start, stop: tokens[start:stop], 4)
        self.kv.extend(1, 12)
        self.kv.cache(1, chain, 0, 3)
        self.kv.begin_with(2, chain, self.kv.match(chain, 8))
        self.kv.extend(2, 12)
        self.kv.release(1)
        for name in ("used", "idle", "kept"):
            self.adapters.admit(name, 3)
        self.adapters.pin("used")
        self.adapters.keep("kept")

    def check(self) -> None:
        check_pool(self.pool, self.kv, self.adapters)


def test_a_pool_with_something_of_every_sort_is_whole() -> None:
    memory = Memory()
    memory.check()
    sizes = memory.pool.num_free, memory.pool.idle.size, memory.pool.kept.size, memory.kv.num_pages
    assert sizes == (11, 4, 3, 3)


FAULTS: dict[str, Callable[[Memory], object]] = {
    "a page that nobody owns is counted": lambda m: m.pool.allocate(1),
    "a page is owned but free": lambda m: m.pool.release(m.adapters.pages("used")[:1]),
    "a page is counted once too often": lambda m: m.pool.retain(m.kv.pages(2)[:1]),
    "a page belongs to two sequences": lambda m: m.kv.pages(2).append(m.kv.pages(2)[0]),
    "an adapter lost a page": lambda m: m.adapters.pages("idle").pop(),
    "two adapters have one page": lambda m: m.adapters.pages("idle").__setitem__(0, m.adapters.pages("kept")[0]),
    "an adapter has a page of K/V": lambda m: m.adapters.pages("idle").__setitem__(0, m.kv.pages(2)[0]),
    "an idle adapter is in no order": lambda m: m.pool.idle.discard("idle"),
    "a kept adapter is in no order": lambda m: m.pool.kept.discard("kept"),
    "something unknown is idle": lambda m: m.pool.idle.add("unknown", 1, m.adapters, 0.0),
    "something unknown is kept": lambda m: m.pool.kept.add("unknown", 1, m.adapters, 0.0),
    "a kept adapter could go as an idle one": lambda m: m.adapters._wanted_kept.clear(),
    "an idle page is in no order": lambda m: m.pool.idle.discard(
        next(key for key in m.pool.idle.keys if isinstance(key, bytes))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_wrong_is_found(fault: str) -> None:
    memory = Memory()
    FAULTS[fault](memory)
    with pytest.raises(AssertionError):
        memory.check()
