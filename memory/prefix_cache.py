"""The prefix cache: full pages of K/V, found again by the tokens before and in them and by what computed them.

A page is named by a hash over the name of the page before it, its own tokens, and the content of the adapters that act
on any of them; so a name stands for everything that its K/V depends on. The base model's pages have no adapter in
their names: an activated adapter shares them up to where it begins to act.

Whoever uses a page uses all pages before it, and lets go of the last one first. So a page is never idle for longer than
one behind it, and in the order of idleness none goes before those that are found through it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

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
    key: bytes
    page: int
    before: bytes | None
    idle: bool = False


class PrefixCache:
    """Pages by name. The cache is one owner of each of its pages, beside the sequences that use them.

    ``KvCache`` tells it who uses what. Pages that nobody uses stay until they are wanted for something else (see
    ``IdleOrder``).

    Args:
        pool: that the pages are of.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._by_key: dict[bytes, _CachedPage] = {}
        self._by_page: dict[int, _CachedPage] = {}
        self._num_idle = 0

    @property
    def num_pages(self) -> int:
        """Cached pages, those in use included."""
        return len(self._by_key)

    @property
    def num_idle_pages(self) -> int:
        """Cached pages that nobody uses."""
        return self._num_idle

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
            pages.append(cached.page)
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
            return cached.page
        before = chain.known[index - 1] if index else None
        if before is None or before in self._by_key:
            self._by_key[key] = self._by_page[page] = _CachedPage(key, page, before)
            self._pool.retain((page,))
        return page

    def _wake(self, cached: _CachedPage) -> None:
        if cached.idle:
            cached.idle = False
            self._num_idle -= 1
            self._pool.idle.discard(cached.key)

    def rest(self, pages: Iterable[int], *, keep: bool) -> None:
        """Nobody uses these pages any more; last ones first. Those that are cached stay, unless ``keep`` is false."""
        for page in pages:
            cached = self._by_page.get(page)
            if cached is None:
                continue
            if keep:
                cached.idle = True
                self._num_idle += 1
                self._pool.idle.add(cached.key, 1, self)
            else:
                self._forget(cached)

    def put_out(self, key: Hashable) -> None:
        """Give up an idle page, for ``IdleOrder``."""
        assert isinstance(key, bytes)
        self._num_idle -= 1
        self._forget(self._by_key[key])

    def _forget(self, cached: _CachedPage) -> None:
        del self._by_key[cached.key], self._by_page[cached.page]
        self._pool.release((cached.page,))

    def clear(self) -> None:
        """Forget every page, because what lies in them is in doubt. None may be in use."""
        assert self._num_idle == len(self._by_key), "a cached page is in use"
        for cached in list(self._by_key.values()):
            self._wake(cached)
            self._forget(cached)

    def check_integrity(self, used: Iterable[int]) -> None:
        """AssertionError where names, pages and idleness disagree; ``used`` are the pages that sequences hold."""
        used = set(used)
        assert {cached.page for cached in self._by_key.values()} == set(self._by_page)
        assert len(self._by_page) == len(self._by_key)
        assert self._num_idle == sum(cached.idle for cached in self._by_key.values())
        place = {key: at for at, key in enumerate(self._pool.idle.keys)}
        for key, cached in self._by_key.items():
            assert cached.key == key
            assert cached.idle == (cached.page not in used) == (key in place)
            assert not cached.idle or self._pool.refcount(cached.page) == 1, "somebody else holds an idle page"
            before = None if cached.before is None else self._by_key[cached.before]
            if before is not None and before.idle:
                assert cached.idle, "in use, though not found through a page in use"
                assert place[key] < place[before.key], "a page would go before one that is found through it"
