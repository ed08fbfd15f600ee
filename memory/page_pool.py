"""The page pool: which pages are free, and how many owners hold each of the others.

Allocating and releasing cost time in proportion to the pages asked for, whatever the size of the pool; making room, in
proportion to what is put out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator

from loraplex.memory.eviction_order import EvictionOrder, LruOrder
from loraplex.memory.free_runs import FreeRuns


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class PagePool:
    """Page ids 0 to ``num_pages - 1`` and their reference counts. It holds no memory itself.

    Args:
        num_pages: pages in all, at least 1.
        on_release: called with the pages whose count has fallen to 0, when they are free again. Tests poison them.
        order: in which idle adapters and cached pages go when room is wanted; the least recently used first by default.

    Attributes:
        idle: what nobody uses, and could go.
        kept: what nobody uses, but an operator wants kept: it goes only at any price, and after all that is idle.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        on_release: Callable[[list[int]], None] | None = None,
        order: EvictionOrder | None = None,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool has at least 1 page, not {num_pages}")
        self._counts = array("i", bytes(4 * num_pages))
        self._runs = FreeRuns(num_pages)
        self._num_free = num_pages
        self._on_release = on_release
        self.idle: EvictionOrder = LruOrder() if order is None else order
        self.kept: EvictionOrder = LruOrder()

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_free

    @property
    def num_reachable(self) -> int:
        """Pages that are free, or could be by putting out what is idle."""
        return self._num_free + self.idle.size

    @property
    def num_reachable_alone(self) -> int:
        """Pages that are free, or could be at any price: by putting out what is idle and what is kept."""
        return self._num_free + self.idle.size + self.kept.size

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` would succeed."""
        return count <= self._num_free

    def make_room(self, count: int, *, at_any_price: bool = False) -> bool:
        """Put out what is idle until ``count`` pages are free; nothing, and False, where that would not suffice.

        Args:
            count: pages that are to be free.
            at_any_price: put out what is kept, too, when nothing idle is left.
        """
        if count > (self.num_reachable_alone if at_any_price else self.num_reachable):
            return False
        while self._num_free < count:
            (self.idle if self.idle.size else self.kept).put_out_first()
        return True

    def allocate(self, count: int, *, contiguous: bool = False) -> list[int]:
        """Take ``count`` free pages, each with a count of 1, in ascending runs.

        Args:
            count: how many.
            contiguous: prefer one run; where there is none, few long ones. Otherwise the shortest runs are used up
                first, so that long ones remain for those who want them.

        Raises:
            OutOfPages: fewer than ``count`` are free; nothing has changed.
        """
        if count > self._num_free:
            raise OutOfPages(f"{count} pages asked for, {self._num_free} of {self.num_pages} free")
        pages = self._take_long(count) if contiguous else self._take_short(count)
        self._num_free -= count
        for page in pages:
            self._counts[page] = 1
        return pages

    def _take_short(self, count: int) -> list[int]:
        pages: list[int] = []
        while len(pages) < count:
            pages.extend(self._runs.take_smallest(count - len(pages)))
        return pages

    def _take_long(self, count: int) -> list[int]:
        if count > 0 and (run := self._runs.take_fitting(count)) is not None:
            return list(run)
        pages: list[int] = []
        while len(pages) < count:
            pages.extend(self._runs.take_largest(count - len(pages)))
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Count one more owner of each page; all must be in use."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is free"
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> int:
        """Count one owner less of each page. Returns how many of them are free now."""
        counts = self._counts
        freed = []
        for page in pages:
            assert counts[page] > 0, f"page {page} is free"
            counts[page] -= 1
            if counts[page] == 0:
                freed.append(page)
        for first, length in _ascending_runs(freed):
            self._runs.add(first, length)
        self._num_free += len(freed)
        if freed and self._on_release is not None:
            self._on_release(freed)
        return len(freed)

    def free_pages(self) -> Iterator[int]:
        """Every page that nobody holds, from the runs in which they are filed; for checks."""
        for first, length in self._runs:
            yield from range(first, first + length)

    def refcount(self, page: int) -> int:
        """Owners of a page; 0 for a free one."""
        return self._counts[page]

    def check_integrity(self) -> None:
        """AssertionError where free runs and counts disagree. Costs time in proportion to the pool."""
        self._runs.check_integrity()
        free = list(self.free_pages())
        assert len(free) == self._num_free
        assert set(free) == {page for page, count in enumerate(self._counts) if count == 0}
        assert min(self._counts) >= 0


def _ascending_runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Split pages into (first, length) of stretches that ascend by one."""
    start = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield pages[start], end - start
            start = end
