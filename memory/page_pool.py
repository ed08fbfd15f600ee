"""The page pool: which pages are free, and how many owners hold each of the others.

Free pages are kept as maximal runs, tagged at both ends (Knuth, The Art of Computer Programming 1, 2.5: boundary tags)
and filed by powers of two of their length. Allocating and releasing cost time in proportion to the pages asked for,
whatever the size of the pool.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from loraplex.memory.idle_order import IdleOrder


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class _FreeRuns:
    """Disjoint maximal runs of free pages, found by either end and by length."""

    def __init__(self, num_pages: int) -> None:
        self._length: dict[int, int] = {}  # by first page
        self._first: dict[int, int] = {}  # by the page behind the last
        self._slot: dict[int, int] = {}  # by first page: index within its class
        self._classes: list[list[int]] = [[] for _ in range(num_pages.bit_length())]
        self._occupied = 0  # bit k: class k (2**k to 2**(k+1) - 1 pages) has a run
        self._insert(0, num_pages)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first page, length) of every run."""
        return iter(self._length.items())

    def add(self, first: int, length: int) -> None:
        """File a run that has become free, joined with its free neighbours."""
        behind = first + length
        before = self._first.get(first)
        if before is not None:
            length += self._remove(before)
            first = before
        if behind in self._length:
            length += self._remove(behind)
        self._insert(first, length)

    def take_smallest(self, limit: int) -> range:
        """Take up to ``limit`` pages from the front of a run of the lowest class."""
        first = self._classes[(self._occupied & -self._occupied).bit_length() - 1][-1]
        length = self._remove(first)
        taken = min(limit, length)
        if taken < length:
            self._insert(first + taken, length - taken)
        return range(first, first + taken)

    def take_largest(self, limit: int) -> range:
        """Take up to ``limit`` pages from the end of a run of the highest class."""
        return self._take_end(self._classes[self._occupied.bit_length() - 1][-1], limit)

    def take_fitting(self, count: int) -> range | None:
        """Take ``count`` pages in one run, from the end of a run about as long; None where no run was found."""
        size_class = count.bit_length() - 1
        # Looking at no more than `count` runs keeps the promise of cost; a longer run may be cut instead.
        for first in islice(reversed(self._classes[size_class]), count):
            if self._length[first] >= count:
                return self._take_end(first, count)
        longer = self._occupied >> (size_class + 1)
        if not longer:
            return None
        size_class += (longer & -longer).bit_length()
        return self._take_end(self._classes[size_class][-1], count)

    def _take_end(self, first: int, limit: int) -> range:
        length = self._remove(first)
        taken = min(limit, length)
        if taken < length:
            self._insert(first, length - taken)
        return range(first + length - taken, first + length)

    def _insert(self, first: int, length: int) -> None:
        size_class = length.bit_length() - 1
        members = self._classes[size_class]
        self._length[first] = length
        self._first[first + length] = first
        self._slot[first] = len(members)
        members.append(first)
        self._occupied |= 1 << size_class

    def _remove(self, first: int) -> int:
        length = self._length.pop(first)
        del self._first[first + length]
        size_class = length.bit_length() - 1
        members = self._classes[size_class]
        slot, last = self._slot.pop(first), members.pop()
        if last != first:
            members[slot] = last
            self._slot[last] = slot
        if not members:
            self._occupied &= ~(1 << size_class)
        return length

    def check_integrity(self) -> None:
        """AssertionError where tags, classes and runs disagree, or two runs touch."""
        assert self._first == {first + length: first for first, length in self}
        assert not self._first.keys() & self._length.keys(), "two free runs touch"
        for size_class, members in enumerate(self._classes):
            assert bool(members) == bool(self._occupied >> size_class & 1)
            for slot, first in enumerate(members):
                assert self._slot[first] == slot
                assert self._length[first].bit_length() - 1 == size_class
        assert len(self._slot) == len(self._length) == sum(map(len, self._classes))


class PagePool:
    """Page ids 0 to ``num_pages - 1`` and their reference counts. It holds no memory itself.

    Args:
        num_pages: pages in all, at least 1.
        on_release: called with the pages whose count has fallen to 0, when they are free again. Tests poison them.
    """

    def __init__(self, num_pages: int, *, on_release: Callable[[list[int]], None] | None = None) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool has at least 1 page, not {num_pages}")
        self._counts = array("i", bytes(4 * num_pages))
        self._runs = _FreeRuns(num_pages)
        self._num_free = num_pages
        self._on_release = on_release
        self.idle = IdleOrder()

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
        return self._num_free + self.idle.num_pages

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` would succeed."""
        return count <= self._num_free

    def make_room(self, count: int) -> bool:
        """Put out what is idle until ``count`` pages are free; nothing, and False, where that would not suffice."""
        if count > self.num_reachable:
            return False
        while self._num_free < count:
            self.idle.put_out_first()
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

    def refcount(self, page: int) -> int:
        """Owners of a page; 0 for a free one."""
        return self._counts[page]

    def check_integrity(self) -> None:
        """AssertionError where free runs and counts disagree. Costs time in proportion to the pool."""
        self._runs.check_integrity()
        free = [page for first, length in self._runs for page in range(first, first + length)]
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
