"""The K/V cache: which pages hold the keys and values of which sequence."""

from __future__ import annotations

from collections import Counter

from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixCache, PrefixMatch


class KvCache:
    """One page list for each sequence; page ``i`` holds its tokens ``i * page_tokens`` and on.

    Args:
        pool: where pages come from.
        page_tokens: tokens whose K/V one page holds.
        prefixes: over the same pool; one under which all pages are worth the same by default.

    Attributes:
        prefixes: full pages that later sequences may begin with.
    """

    def __init__(self, pool: PagePool, page_tokens: int, prefixes: PrefixCache | None = None) -> None:
        if page_tokens < 1:
            raise ValueError(f"a page holds at least 1 token, not {page_tokens}")
        self._pool = pool
        self._page_tokens = page_tokens
        self._pages: dict[int, list[int]] = {}
        self._users: dict[int, int] = {}
        self._replaced: set[int] = set()
        self.prefixes = PrefixCache(pool) if prefixes is None else prefixes

    @property
    def page_tokens(self) -> int:
        """Tokens whose K/V one page holds."""
        return self._page_tokens

    @property
    def num_pages(self) -> int:
        """Pages in use; one that sequences share counts once."""
        return len(self._users)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the sequences that hold pages."""
        return tuple(self._pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the K/V of this many tokens."""
        return -(-num_tokens // self._page_tokens)

    def missing_pages(self, seq_id: int, num_tokens: int) -> int:
        """Pages that ``extend`` would take."""
        missing = -(-num_tokens // self._page_tokens) - len(self._pages.get(seq_id, ()))
        return max(0, missing)

    def extend(self, seq_id: int, num_tokens: int) -> None:
        """Give a sequence room for ``num_tokens`` tokens in all; it never shrinks.

        Raises:
            OutOfPages: too few are free; nothing has changed.
        """
        missing = self.missing_pages(seq_id, num_tokens)
        if missing:
            pages = self._pool.allocate(missing)
            self._pages.setdefault(seq_id, []).extend(pages)
            self._users.update(dict.fromkeys(pages, 1))

    def match(self, chain: PageChain, num_tokens: int) -> PrefixMatch:
        """The longest cached beginning of at most ``num_tokens`` tokens, whole pages only."""
        return self.prefixes.match(chain, num_tokens // self._page_tokens)

    def begin_with(self, seq_id: int, chain: PageChain, found: PrefixMatch) -> int:
        """Let a sequence that holds nothing yet begin with the cached pages that ``match`` has just found.

        Returns:
            Tokens whose K/V it has now, a multiple of ``page_tokens``.
        """
        assert seq_id not in self._pages, f"sequence {seq_id} already holds pages"
        pages = self.prefixes.take(chain, found.num_pages)
        if pages:
            self._pool.retain(pages)
            self._pages[seq_id] = pages
            for page in pages:
                self._users[page] = self._users.get(page, 0) + 1
        return len(pages) * self._page_tokens

    def cache(self, seq_id: int, chain: PageChain, first: int, stop: int) -> None:
        """Let others begin with pages ``first`` to ``stop - 1`` of a sequence, which are full and computed.

        One that is cached already, computed by another sequence at the same time, is given up for that one's.
        """
        pages = self._pages[seq_id]
        for index in range(first, stop):
            own = pages[index]
            cached = self.prefixes.put(chain, index, own)
            if cached != own:
                self._pool.retain((cached,))
                self._users[cached] = self._users.get(cached, 0) + 1
                pages[index] = cached
                self._replaced.add(seq_id)
                self._leave([own], keep=False)

    def pages(self, seq_id: int) -> list[int]:
        """The page list of a sequence, to be read only. Empty for an unknown one.

        It grows as the sequence does; between steps ``cache`` may put a page of the same content in another's place
        (see ``take_replaced``).
        """
        return self._pages.get(seq_id, [])

    def take_replaced(self) -> set[int]:
        """Sequences that have pages in which ``cache`` put others, since the last call."""
        replaced, self._replaced = self._replaced, set()
        return replaced

    def release(self, seq_id: int, *, keep: bool = True) -> None:
        """Give up the pages of a sequence; unknown ones are ignored.

        Cached pages that nobody uses any more stay cached until they are wanted, unless ``keep`` is false.
        """
        pages = self._pages.pop(seq_id, None)
        self._replaced.discard(seq_id)
        if pages:
            self._leave(pages[::-1], keep)

    def _leave(self, pages: list[int], keep: bool) -> None:
        """One user less of each page; last ones first."""
        unused: list[int] = []
        users = self._users
        for page in pages:
            count = users.pop(page) - 1
            if count:
                users[page] = count
            else:
                unused.append(page)
        self.prefixes.rest(unused, keep=keep)
        # In ascending order runs of free pages join up best.
        self._pool.release(reversed(pages))

    def check_integrity(self) -> None:
        """AssertionError where page lists, the prefix cache and the pool's counts disagree."""
        users = Counter(page for pages in self._pages.values() for page in pages)
        assert users == self._users
        self.prefixes.check_integrity(users)
        for page, count in users.items():
            owners = count + self.prefixes.holds(page)
            assert self._pool.refcount(page) == owners, f"page {page} has {owners} owners here"
        for seq_id, pages in self._pages.items():
            assert pages, f"sequence {seq_id} is known but holds nothing"
            assert len(set(pages)) == len(pages), f"sequence {seq_id} holds a page twice"
