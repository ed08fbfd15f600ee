"""Random identities, aliases, reloads and requests over the pool's caches: nothing is ever hit under another identity.

Every page is tagged with what was written to it: an adapter's identity and page number, or the tokens, the identity
that acts on them from where, and the salt. Whatever the caches hand out must carry the tag that is expected, page by
page; prompts are made so that equal tags mean equal content. The pool is proved whole every so often. The last line of
the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import EvictionOrder, LruOrder, ValueOrder
from loraplex.memory.integrity import check_pool
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixCache

PAGE_TOKENS = 4
SALTS = ("", "", "", "one tenant", "another")
GROUPS, MEMBERS = 4, 3
SHARED_PAGES, PROMPT_PAGES = 2, 4
"""The prompts of a group have their first pages in common."""


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that holds pages, and the adapter that it pins."""

    seq_id: int
    identity: str


class Soak:
    """The caches over one small pool, names that stand for identities, and a model of what lies on each page.

    Args:
        seed: of all that is random.
        by_value: the order of eviction.
        num_pages: so few that most admissions put something out.
        num_names, num_running: names in use, and sequences at once.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        by_value: bool = True,
        num_pages: int = 80,
        num_names: int = 24,
        num_running: int = 8,
    ) -> None:
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self.tags: list[Hashable] = [None] * num_pages
        order: EvictionOrder = ValueOrder() if by_value else LruOrder()
        self.pool = PagePool(num_pages, on_release=self._poison, order=order)
        rates = self.rates = ArrivalRates(200.0, max_keys=10_000, clock=lambda: self.now)
        self.kv = KvCache(self.pool, PAGE_TOKENS, PrefixCache(self.pool, rates, lambda: 0.1 + self.now % 7))
        self.adapters = AdapterCache(self.pool, rates, lambda identity, num_pages: 0.1 + len(identity) % 5)
        self.num_running = num_running
        self.running: deque[Running] = deque()
        self.names = [self._new_identity() for _ in range(num_names)]
        self.prompts = [
            [
                (group * MEMBERS + (0 if at < SHARED_PAGES * PAGE_TOKENS else member)) * 1000 + at
                for at in range(PROMPT_PAGES * PAGE_TOKENS)
            ]
            for group in range(GROUPS)
            for member in range(MEMBERS)
        ]

    def _poison(self, pages: list[int]) -> None:
        for page in pages:
            self.tags[page] = None

    def _new_identity(self) -> str:
        self.counts["identities"] += 1
        return f"{self.rng.getrandbits(128):032x}"

    def step(self) -> None:
        """One random operation."""
        self.now += 1.0
        rng, chance = self.rng, self.rng.random()
        name = rng.randrange(len(self.names))
        if chance < 0.45:
            self._move(name, self._new_identity())
            self.counts["reloads"] += 1
        elif chance < 0.55:
            self._move(name, self.names[rng.randrange(len(self.names))])
            self.counts["aliases"] += 1
        elif chance < 0.58:
            kept = self.adapters.is_kept(self.names[name])
            (self.adapters.unkeep if kept else self._keep)(self.names[name])
            self.counts["pins"] += 1
        else:
            self._request(name)
            self.counts["requests"] += 1

    def _keep(self, identity: str) -> None:
        if self.adapters.kept_pages < self.pool.num_pages * 2 // 3:
            self.adapters.keep(identity)

    def _move(self, name: int, identity: str) -> None:
        """A name stands for something else from now on; what no name stands for any more may go at once."""
        old, self.names[name] = self.names[name], identity
        if self.adapters.is_kept(old):
            self._keep(identity)
        if old not in self.names:
            self.adapters.unkeep(old)
            if self.rng.random() < 0.5:
                self.adapters.drop(old)

    def _request(self, name: int) -> None:
        while len(self.running) >= self.num_running:
            self._finish(self.rng.random() < 0.9)
        rng = self.rng
        identity = self.names[name] if rng.random() < 0.9 else ""
        start = 0 if rng.random() < 0.7 else rng.randrange(PROMPT_PAGES * PAGE_TOKENS)
        salt = SALTS[rng.randrange(len(SALTS))]
        prompt = rng.randrange(len(self.prompts))
        tags = self._expected(prompt, identity, start, salt)
        tokens = self.prompts[prompt]
        chain = PageChain(lambda a, b: tokens[a:b], PAGE_TOKENS, content=identity, start=start, scope=salt)
        if identity:
            self._admit(identity)
        self._compute(chain, tags)
        self.running.append(Running(int(self.now), identity))

    @staticmethod
    def _expected(prompt: int, identity: str, start: int, salt: str) -> list[Hashable]:
        """What each page of a prompt has to hold."""
        group = prompt // MEMBERS
        return [
            (
                (group, None if page < SHARED_PAGES else prompt, page),
                (identity, max(0, start)) if identity and (page + 1) * PAGE_TOKENS > start else None,
                salt,
            )
            for page in range(PROMPT_PAGES)
        ]

    def _admit(self, identity: str) -> None:
        self.rates.note(identity)
        num_pages = 1 + int(identity[0], 16) % 6
        while not self.adapters.can_admit(identity, num_pages, at_any_price=True):
            self._finish(keep=True)
        pages = self.adapters.admit(identity, num_pages, at_any_price=True)
        if pages is not None:
            for at, page in enumerate(pages):
                assert self.tags[page] is None, "a page was handed out that somebody holds"
                self.tags[page] = (identity, at)
        held = [self.tags[page] for page in self.adapters.pages(identity)]
        assert held == [(identity, at) for at in range(num_pages)], "an adapter's pages hold something else"
        self.counts["adapter_hits"] += pages is None
        self.adapters.pin(identity)

    def _compute(self, chain: PageChain, tags: list[Hashable]) -> None:
        """Begin with what is cached, compute the rest, and cache it."""
        seq_id, tokens = int(self.now), PROMPT_PAGES * PAGE_TOKENS
        while not self._begin(seq_id, chain):
            self._finish(keep=True)
        hit = len(self.kv.pages(seq_id))
        self.kv.extend(seq_id, tokens)
        pages = self.kv.pages(seq_id)
        assert [self.tags[page] for page in pages[:hit]] == tags[:hit], "a prefix was hit under another name"
        for page, tag in zip(pages[hit:], tags[hit:]):
            assert self.tags[page] is None, "a page was handed out that somebody holds"
            self.tags[page] = tag
        self.kv.cache(seq_id, chain, hit, PROMPT_PAGES)
        assert [self.tags[page] for page in pages] == tags, "a page was exchanged for one of other content"
        self.counts["prefix_hit_pages"] += hit

    def _begin(self, seq_id: int, chain: PageChain) -> bool:
        found = self.kv.match(chain, PROMPT_PAGES * PAGE_TOKENS)
        if PROMPT_PAGES - found.num_pages > self.pool.num_reachable_alone - found.num_idle:
            return False
        self.kv.begin_with(seq_id, chain, found)
        assert self.pool.make_room(PROMPT_PAGES - found.num_pages, at_any_price=True)
        return True

    def _finish(self, keep: bool) -> None:
        done = self.running.popleft()
        self.kv.release(done.seq_id, keep=keep)
        if done.identity:
            self.adapters.unpin(done.identity)

    def check(self) -> None:
        """Prove the pool, and that every resident thing holds what its name says."""
        check_pool(self.pool, self.kv, self.adapters)
        self.adapters.take_changes()
        for identity in self.adapters.resident:
            held = [self.tags[page] for page in self.adapters.pages(identity)]
            assert held == [(identity, at) for at in range(len(held))]
        cached = [self.tags[page] for page in self.kv.prefixes.pages]
        assert len(set(cached)) == len(cached), "the same content is cached under two names"


def soak(count: int, seed: int, *, by_value: bool = True, check_every: int = 10_000, verbose: bool = False) -> Soak:
    """Run ``count`` operations; AssertionError where anything was hit under another identity."""
    subject = Soak(seed, by_value=by_value)
    for done in range(1, count + 1):
        subject.step()
        if done % check_every == 0:
            subject.check()
            if verbose and done % (100 * check_every) == 0:
                print(f"{done} of {count}", file=sys.stderr, flush=True)
    subject.check()
    return subject


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--count", type=int, default=10_000_000, help="operations")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--lru", action="store_true", help="the least recently used first, not the least worth")
    options = arguments.parse_args()
    started = time.perf_counter()
    subject = soak(options.count, options.seed, by_value=not options.lru, verbose=True)
    record = {
        "operations": options.count,
        "seconds": round(time.perf_counter() - started, 1),
        "order": "lru" if options.lru else "value",
        **subject.counts,
        "adapters_put_out": dict(subject.adapters.evictions_by_reason),
        "prefix_pages_put_out": dict(subject.kv.prefixes.evicted_pages),
        "wrong_hits": 0,  # the first one ends the run
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
