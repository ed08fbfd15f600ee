"""The K/V cache: which pages hold the keys and values of which sequence."""

from __future__ import annotations

from collections import Counter

from loraplex.memory.page_pool import PagePool


class KvCache:
    """One page list for each sequence; page ``i`` holds its tokens ``i * page_tokens`` and on.

    Args:
        pool: where pages come from.
        page_tokens: tokens whose K/V one page holds.
    """

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        if page_tokens < 1:
            raise ValueError(f"a page holds at least 1 token, not {page_tokens}")
        self._pool = pool
        self._page_tokens = page_tokens
        self._pages: dict[int, list[int]] = {}
        self._num_pages = 0

    @property
    def page_tokens(self) -> int:
        """Tokens whose K/V one page holds."""
        return self._page_tokens

    @property
    def num_pages(self) -> int:
        """Pages in use; one that sequences share counts once."""
        return self._num_pages

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
            self._num_pages += missing

    def share_prefix(self, source: int, target: int, num_tokens: int) -> int:
        """Let ``target``, which holds nothing yet, begin with the pages of the first tokens of ``source``.

        Only pages that lie full within ``num_tokens`` are shared, so that neither writes where the other reads.

        Returns:
            Tokens shared, a multiple of ``page_tokens``.
        """
        assert target not in self._pages, f"sequence {target} already holds pages"
        shared = self.pages(source)[: num_tokens // self._page_tokens]
        if shared:
            self._pool.retain(shared)
            self._pages[target] = shared
        return len(shared) * self._page_tokens

    def pages(self, seq_id: int) -> list[int]:
        """The page list of a sequence, to be read only; it grows as the sequence does. Empty for an unknown one."""
        return self._pages.get(seq_id, [])

    def release(self, seq_id: int) -> None:
        """Give up the pages of a sequence; unknown ones are ignored."""
        pages = self._pages.pop(seq_id, None)
        if pages:
            self._num_pages -= self._pool.release(pages)

    def check_integrity(self) -> None:
        """AssertionError where page lists and the pool's counts disagree."""
        users = Counter(page for pages in self._pages.values() for page in pages)
        assert len(users) == self._num_pages
        for page, count in users.items():
            assert self._pool.refcount(page) == count, f"page {page} has {count} users here"
        for seq_id, pages in self._pages.items():
            assert pages, f"sequence {seq_id} is known but holds nothing"
            assert len(set(pages)) == len(pages), f"sequence {seq_id} holds a page twice"
