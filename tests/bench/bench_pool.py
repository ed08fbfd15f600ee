"""What the pool's pages cost and waste: prints a record of two things.

(a) Seconds for each page asked for, for allocating, matching and putting out, in pools of a thousand to a million pages
that are full of cached pages: the cost must not grow with the pool. (b) A simulated day of mixed adapters and sequences
in a full pool of an 8 B shape: which share of the allocated bytes holds no data, over time, also when cached
pages, which are full, are left out; and in how many runs adapters lie. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from itertools import accumulate, count, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_image import CHUNK, chunks_of
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import ValueOrder
from loraplex.memory.integrity import check_pool
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixCache

PAGE_TOKENS, PAGE_ELEMS = 16, 32768
WIDTHS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
"""In and out features of the sites of a layer."""
QUERY_VALUE, ATTENTION, EVERY = ("q_proj", "v_proj"), tuple(WIDTHS)[:4], tuple(WIDTHS)
KINDS = (
    (EVERY, 8, 0.15),
    (EVERY, 16, 0.3),
    (EVERY, 32, 0.15),
    (EVERY, 64, 0.08),
    (EVERY, 128, 0.02),
    (ATTENTION, 8, 0.08),
    (ATTENTION, 16, 0.12),
    (ATTENTION, 64, 0.03),
    (QUERY_VALUE, 8, 0.05),
    (QUERY_VALUE, 16, 0.02),
)
"""Sites, rank, and share of the adapters."""


class Memory:
    """The pool and its caches, by value, over a clock of our own."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.now = 0.0
        self.pool = PagePool(num_pages, order=ValueOrder())
        self.rates = ArrivalRates(clock=lambda: self.now)
        self.kv = KvCache(self.pool, page_tokens, PrefixCache(self.pool, self.rates, lambda: 2e-3))
        self.adapters = AdapterCache(self.pool, self.rates, lambda identity, num_pages: 0.01)


def chain_of(first: int, num_pages: int) -> PageChain:
    """A prompt of its own for each ``first``, a page of 2 tokens."""
    tokens = [first * 10_000 + at for at in range(2 * num_pages)]
    return PageChain(lambda start, stop: tokens[start:stop], 2)


def cost_per_page(num_pages: int, asked: int, repeats: int) -> dict[str, float]:
    """Median seconds a page, in a pool that is full of cached pages, of sequences that come and go."""
    memory = Memory(num_pages, page_tokens=2)
    sequences = count()
    while memory.pool.num_free >= asked:
        _serve(memory, next(sequences), asked)
    taken: dict[str, list[float]] = {"serve": [], "match": [], "adapter": []}
    for repeat in range(repeats):
        chain = chain_of(first := next(sequences), asked)
        for index in range(asked):
            chain.key(index)
        started = time.perf_counter()
        _serve(memory, first, asked, chain)
        served = time.perf_counter()
        found = memory.kv.match(chain_again := chain.fork(chain._tokens, 2 * asked), 2 * asked)
        matched = time.perf_counter()
        memory.adapters.admit(f"adapter {repeat}", asked)
        admitted = time.perf_counter()
        assert found.num_pages == asked == len(chain_again.known)
        taken["serve"].append((served - started) / asked)
        taken["match"].append((matched - served) / asked)
        taken["adapter"].append((admitted - matched) / asked)
    return {name: median(seconds) for name, seconds in taken.items()}


def _serve(memory: Memory, seq_id: int, num_pages: int, chain: PageChain | None = None) -> None:
    """A sequence comes, puts out others' pages, has its own cached, and goes."""
    chain = chain or chain_of(seq_id, num_pages)
    assert memory.pool.make_room(num_pages)
    memory.kv.extend(seq_id, 2 * num_pages)
    memory.kv.cache(seq_id, chain, 0, num_pages)
    memory.kv.release(seq_id)


def costs(sizes: list[int], asked: int = 64, repeats: int = 400) -> dict[str, Any]:
    """By size of the pool, and the largest pool's over the smallest's."""
    found = {size: cost_per_page(size, asked, repeats) for size in sizes}
    for size, seconds in found.items():
        print(f"{size:8} pages: " + ", ".join(f"{name} {1e6 * value:.3f} us" for name, value in seconds.items()))
    ratios = {name: found[sizes[-1]][name] / found[sizes[0]][name] for name in found[sizes[0]]}
    print("largest over smallest: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return {"seconds_a_page": found, "largest_over_smallest": ratios}


def used_elements(sites: tuple[str, ...], rank: int) -> tuple[int, int]:
    """(elements that hold weights, elements up to the end of the last row) of a layer of an adapter."""
    features = [WIDTHS[site] for site in sites]
    held = rank * sum(map(sum, features))
    return held, rank * CHUNK * sum(chunks_of(width) for pair in features for width in pair)


class Day:
    """Requests of a Zipf mix of adapters, answered in a pool that is kept full.

    Sequences grow token by token, so time goes by in steps; arrivals keep as many of them going as the pool takes.

    Args:
        num_adapters, num_pages: of the trace and of the pool.
        seed: of all that is random.
    """

    def __init__(self, num_adapters: int, num_pages: int, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.memory = Memory(num_pages, PAGE_TOKENS)
        weights = [share for *_, share in KINDS]
        self.kinds = [KINDS[at][:2] for at in self.rng.choices(range(len(KINDS)), weights, k=num_adapters)]
        self.held = {f"{at:06}": used_elements(*kind)[0] for at, kind in enumerate(self.kinds)}
        self.pages = {f"{at:06}": -(-used_elements(*kind)[1] // PAGE_ELEMS) for at, kind in enumerate(self.kinds)}
        self.popularity = list(accumulate(1 / (at + 1) for at in range(num_adapters)))
        self.identities = list(self.held)
        self.ids = count()
        self.growing: dict[int, tuple[int, int, str, PageChain]] = {}  # tokens now and at the end, adapter, names
        self.runs: Counter[int] = Counter()

    def run(self, hours: float, step_seconds: float = 1.0, step_tokens: int = 30) -> dict[str, Any]:
        """Waste by source as shares of the allocated bytes, averaged over the time in which the pool was full."""
        samples: list[tuple[float, ...]] = []
        steps = int(hours * 3600 / step_seconds)
        for step in range(steps):
            self.memory.now = step * step_seconds
            # Load breathes over the day, between one and three arrivals in a step.
            for _ in range(1 + int(1.5 + 1.5 * math.sin(2 * math.pi * step / steps))):
                self._arrive()
            self._grow(step_tokens)
            if self.memory.pool.num_free < 0.05 * self.memory.pool.num_pages:
                samples.append(self._sample())
        check_pool(self.memory.pool, self.memory.kv, self.memory.adapters)
        tail, partial, allocated, cached = (mean(column) for column in zip(*samples))
        admitted = sum(self.runs.values())
        return {
            "hours": hours,
            "samples": len(samples),
            "requests": next(self.ids),
            "waste": (tail + partial) / allocated,
            "waste_beside_cached_kv": (tail + partial) / (allocated - cached),
            "waste_adapter_tails": tail / allocated,
            "waste_partial_kv_pages": partial / allocated,
            "adapter_admissions": admitted,
            "admissions_in_one_run": self.runs[1] / admitted,
            "mean_runs": sum(runs * times for runs, times in self.runs.items()) / admitted,
            "prefix_hit_pages": self.memory.kv.prefixes.hit_pages,
            "adapter_hits": self.memory.adapters.hits,
        }

    def _arrive(self) -> None:
        memory, rng = self.memory, self.rng
        identity = rng.choices(self.identities, cum_weights=self.popularity)[0]
        memory.rates.note(identity)
        prompt = min(8000, max(8, int(rng.lognormvariate(6.0, 1.0))))
        answer = min(2000, max(1, int(rng.lognormvariate(5.0, 0.8))))
        needed = memory.kv.pages_for(prompt) + self.pages[identity]
        if needed + 8 * len(self.growing) > memory.pool.num_reachable:
            return
        seq_id = next(self.ids)
        pages = memory.adapters.admit(identity, self.pages[identity])
        if pages is not None:
            self.runs[1 + sum(b != a + 1 for a, b in pairwise(pages))] += 1
        memory.adapters.pin(identity)
        chain = self._chain(identity, seq_id)
        memory.kv.begin_with(seq_id, chain, memory.kv.match(chain, prompt - 1))
        assert memory.pool.make_room(memory.kv.missing_pages(seq_id, prompt))
        memory.kv.extend(seq_id, prompt)
        memory.kv.cache(seq_id, chain, 0, prompt // PAGE_TOKENS)
        self.growing[seq_id] = (prompt, prompt + answer, identity, chain)

    def _chain(self, identity: str, seq_id: int) -> PageChain:
        """Sequences of an adapter begin with one system prompt of 12 pages."""
        common = 12 * PAGE_TOKENS

        def tokens(start: int, stop: int) -> list[int]:
            return [at if at < common else (seq_id << 20) + at for at in range(start, stop)]

        return PageChain(tokens, PAGE_TOKENS, content=identity)

    def _grow(self, step_tokens: int) -> None:
        kv, pool = self.memory.kv, self.memory.pool
        for seq_id, (tokens, end, identity, chain) in list(self.growing.items()):
            more = min(end, tokens + step_tokens)
            if tokens == end or not pool.make_room(kv.missing_pages(seq_id, more)):
                kv.release(seq_id)
                self.memory.adapters.unpin(identity)
                del self.growing[seq_id]
                continue
            kv.extend(seq_id, more)
            kv.cache(seq_id, chain, tokens // PAGE_TOKENS, more // PAGE_TOKENS)
            self.growing[seq_id] = (more, end, identity, chain)

    def _sample(self) -> tuple[float, ...]:
        """Elements of a layer: adapters' that hold nothing, K/V's that hold nothing yet, allocated, idle K/V's."""
        memory = self.memory
        held = sum(self.held[identity] for identity in memory.adapters.resident)
        tail = memory.adapters.num_pages * PAGE_ELEMS - held
        empty = sum(-tokens % PAGE_TOKENS for tokens, *_ in self.growing.values())
        allocated = (memory.pool.num_pages - memory.pool.num_free) * PAGE_ELEMS
        cached = memory.kv.prefixes.num_idle_pages * PAGE_ELEMS
        return tail, empty * (PAGE_ELEMS // PAGE_TOKENS), allocated, cached


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--hours", type=float, default=24.0, help="of the simulated day")
    arguments.add_argument("--adapters", type=int, default=2000)
    arguments.add_argument("--pages", type=int, default=16_000, help="of the simulated pool")
    arguments.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    options = arguments.parse_args()
    record: dict[str, Any] = {"costs": costs(options.sizes)}
    record["day"] = Day(options.adapters, options.pages).run(options.hours)
    for name, value in record["day"].items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    record["machine"] = describe()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
