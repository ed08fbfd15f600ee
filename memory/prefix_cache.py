"""The prefix cache: full pages of K/V, found again by the tokens before and in them and by what computed them.

A page is named by a hash over the name of the page before it, its own tokens, and the content of the adapters that act
on any of them; so a name stands for everything that its K/V depends on. The base model's pages have no adapter in
their names: an activated adapter shares them up to where it begins to act.

Whoever uses a page uses all pages before it, and lets go of the last one first. So a page comes to rest after all that
are found through it; and it rests at what it is worth itself or at the most that one of those is worth, whichever is
more. Among equals the one that came first goes first: none ever goes before one that is found through it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

from loraplex.memory.arrival_rates import NEVER, ArrivalRates, worth_of
from loraplex.memory.page_pool import PagePool

_KEY_BYTES = 32


class PageChain:
    """The names of a sequence's full pages, each worked out once, when it is first asked for.

    Args:
        tokens: gives the tokens from a first position to before a last one.
        page_tokens: tokens of a page.
        content: of the adapters that act on the sequence, with their weights; "" for the base model.
        start: first position on which they act.
        scope: whatever else the pages must have in common to be the same.
    """

    __slots__ = ("_acting", "_keys", "_layout", "_page_tokens", "_root", "_start", "_tokens")

    def __init__(
        self,
        tokens: Callable[[int, int], list[int]],
        page_tokens: int,
        *,
        content: str = "",
        start: int = 0,
        scope: str = "",
    ) -> None:
        self._tokens = tokens
        self._page_tokens = page_tokens
        self._layout = Struct(f"<{page_tokens}q")
        self._acting = content.encode()
        self._start = start
        self._root = blake2b(scope.encode(), digest_size=_KEY_BYTES, person=b"scope").digest()
        self._keys: list[bytes] = []

    def fork(self, tokens: Callable[[int, int], list[int]], num_tokens: int) -> PageChain:
        """The chain of a sequence that has the first ``num_tokens`` tokens in common with this one."""
        other = PageChain(tokens, self._page_tokens, start=self._start)
        other._acting, other._root = self._acting, self._root
        other._keys = self._keys[: num_tokens // self._page_tokens]
        return other

    @property
    def known(self) -> list[bytes]:
        """The names worked out so far, to be read only."""
        return self._keys

    def key(self, index: int) -> bytes:
        """The name of a page all of whose tokens are known."""
        while len(self._keys) <= index:
            self._keys.append(self._name(len(self._keys)))
        return self._keys[index]

    def _name(self, index: int) -> bytes:
        begin = index * self._page_tokens
        tokens = self._tokens(begin, begin + self._page_tokens)
        assert len(tokens) == self._page_tokens, f"page {index} is not full"
        acting = b""
        if self._acting and begin + self._page_tokens > self._start:
            # Where the adapter begins within the page counts: equal tokens may come to be split at another place.
            acting = b"%d %b" % (max(0, self._start - begin), self._acting)
        before = self._keys[-1] if self._keys else self._root
        return blake2b(before + self._layout.pack(*tokens) + acting, digest_size=_KEY_BYTES).digest()


class PrefixMatch(NamedTuple):
    """Leading pages of a chain that are cached: how many, and how many of these nobody uses."""

    num_pages: int = 0
    num_idle: int = 0


@dataclass(slots=True, eq=False)
class _CachedPage:
    """A page, how often it is wanted, and the idle pages found through it: how many, and at least their most worth."""

    key: bytes
    page: int
    before: _CachedPage | None
    log_weight: float = NEVER
    num_idle_behind: int = 0
    floor: float = NEVER
    idle: bool = False

    def came_to_rest_behind(self, worth: float) -> None:
        self.num_idle_behind += 1
        self.floor = max(self.floor, worth)

    def left_from_behind(self) -> None:
        self.num_idle_behind -= 1
        if not self.num_idle_behind:
            self.floor = NEVER


class PrefixCache:
    """Pages by name. The cache is one owner of each of its pages, beside the sequences that use them.

    ``KvCache`` tells it who uses what. Pages that nobody uses stay until they are wanted for something else (see
    ``eviction_order.py``).

    Args:
        pool: that the pages are of.
        rates: the scale on which it is kept how often a page is wanted; without it all pages are worth the same.
        page_seconds: to compute a page again, as things are now; without it, 1.

    Attributes:
        hit_pages: cached pages with which sequences have begun.
        evicted_pages: pages that are cached no longer: for "room", "dropped" by their last user, or "cleared".
    """

    def __init__(
        self,
        pool: PagePool,
        rates: ArrivalRates | None = None,
        page_seconds: Callable[[], float] | None = None,
    ) -> None:
        self._pool = pool
        self._rates = rates
        self._page_seconds = page_seconds
        self._by_key: dict[bytes, _CachedPage] = {}
        self._by_page: dict[int, _CachedPage] = {}
        self._num_idle = 0
        self.hit_pages = 0
        self.evicted_pages: Counter[str] = Counter()

    @property
    def num_pages(self) -> int:
        """Cached pages, those in use included."""
        return len(self._by_key)

    @property
    def num_idle_pages(self) -> int:
        """Cached pages that nobody uses."""
        return self._num_idle

    @property
    def pages(self) -> tuple[int, ...]:
        """The cached pages, those in use included."""
        return tuple(self._by_page)

    def holds(self, page: int) -> bool:
        """Whether a page is cached."""
        return page in self._by_page

    def match(self, chain: PageChain, limit: int) -> PrefixMatch:
        """How many of the first ``limit`` pages of a chain are cached. Costs the logarithm of what was found before."""
        keys, cached = chain.known, self._by_key
        found = min(len(keys), limit)
        # A page is cached only where all before it are, and in use only where all before it are.
        if found and keys[found - 1] not in cached:
            found = bisect_left(range(found), True, key=lambda index: keys[index] not in cached)
        else:
            while found < limit and chain.key(found) in cached:
                found += 1
        used = bisect_left(range(found), True, key=lambda index: cached[keys[index]].idle)
        return PrefixMatch(found, found - used)

    def take(self, chain: PageChain, num_pages: int) -> list[int]:
        """The first pages of a chain, all cached; each is in use from now on."""
        pages: list[int] = []
        for key in chain.known[:num_pages]:
            cached = self._by_key[key]
            self._wake(cached)
            self._want(cached)
            pages.append(cached.page)
        self.hit_pages += len(pages)
        return pages

    def put(self, chain: PageChain, index: int, page: int) -> int:
        """Cache a page that somebody uses, full and computed, as page ``index`` of a chain.

        Returns:
            The page that is cached under this name, in use from now on: ``page``, or another one of the same content.
        """
        key = chain.key(index)
        cached = self._by_key.get(key)
        if cached is not None:
            self._wake(cached)
            if cached.page != page:
                self._want(cached)
            return cached.page
        before = self._by_key.get(chain.known[index - 1]) if index else None
        if before is not None or not index:
            cached = self._by_key[key] = self._by_page[page] = _CachedPage(key, page, before)
            self._want(cached)
            self._pool.retain((page,))
        return page

    def _want(self, cached: _CachedPage) -> None:
        if self._rates is not None:
            cached.log_weight = self._rates.one_more(cached.log_weight)

    def _wake(self, cached: _CachedPage) -> None:
        if cached.idle:
            self._pool.idle.discard(cached.key)
            self._leave_rest(cached)

    def _leave_rest(self, cached: _CachedPage) -> None:
        cached.idle = False
        self._num_idle -= 1
        if cached.before is not None:
            cached.before.left_from_behind()

    def rest(self, pages: Iterable[int], *, keep: bool) -> None:
        """Nobody uses these pages any more; last ones first.

        Those that are cached stay, unless ``keep`` is false and nothing idle is found through them.
        """
        seconds = 1.0 if self._page_seconds is None else self._page_seconds()
        for page in pages:
            cached = self._by_page.get(page)
            if cached is None:
                continue
            if keep or cached.num_idle_behind:
                self._lay_to_rest(cached, seconds)
            else:
                self._forget(cached, "dropped")

    def _lay_to_rest(self, cached: _CachedPage, seconds: float) -> None:
        worth = 0.0
        if self._rates is not None:
            worth = max(worth_of(seconds, cached.log_weight, 1), cached.floor)
        cached.idle = True
        self._num_idle += 1
        if cached.before is not None:
            cached.before.came_to_rest_behind(worth)
        self._pool.idle.add(cached.key, 1, self, worth)

    def put_out(self, key: Hashable) -> None:
        """Give up an idle page, for the order that it was in."""
        assert isinstance(key, bytes)
        cached = self._by_key[key]
        self._leave_rest(cached)
        self._forget(cached, "room")

    def _forget(self, cached: _CachedPage, reason: str) -> None:
        del self._by_key[cached.key], self._by_page[cached.page]
        self._pool.release((cached.page,))
        self.evicted_pages[reason] += 1

    def clear(self) -> None:
        """Forget every page, because what lies in them is in doubt. None may be in use."""
        assert self._num_idle == len(self._by_key), "a cached page is in use"
        for cached in list(self._by_key.values()):
            self._wake(cached)
            self._forget(cached, "cleared")

    def check_integrity(self, used: Iterable[int]) -> None:
        """AssertionError where names, pages and idleness disagree; ``used`` are the pages that sequences hold."""
        used = set(used)
        assert {cached.page for cached in self._by_key.values()} == set(self._by_page)
        assert len(self._by_page) == len(self._by_key)
        assert self._num_idle == sum(cached.idle for cached in self._by_key.values())
        idle_behind = Counter(id(cached.before) for cached in self._by_key.values() if cached.idle)
        place = {key: at for at, key in enumerate(self._pool.idle.keys)}
        for key, cached in self._by_key.items():
            assert cached.key == key
            assert cached.idle == (cached.page not in used) == (key in place)
            assert not cached.idle or self._pool.refcount(cached.page) == 1, "somebody else holds an idle page"
            assert cached.num_idle_behind == idle_behind[id(cached)]
            before = cached.before
            if before is None:
                continue
            assert self._by_key.get(before.key) is before, "the page before has gone"
            if before.idle:
                assert cached.idle, "in use, though not found through a page in use"
                assert place[key] < place[before.key], "a page would go before one that is found through it"
