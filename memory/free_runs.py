"""Which units of a row are free: maximal runs, tagged at both ends and filed by length.

Boundary tags are Knuth's (The Art of Computer Programming 1, 2.5); the files are powers of two of a run's length.
Taking and giving back cost time in proportion to the units taken, or less, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice


class FreeRuns:
    """Disjoint maximal runs of free units (pages, blocks), found by either end and by length.

    Args:
        num_units: units in all, from 0 on; all of them are free at first.
    """

    def __init__(self, num_units: int) -> None:
        self._length: dict[int, int] = {}  # by first unit
        self._first: dict[int, int] = {}  # by the unit behind the last
        self._slot: dict[int, int] = {}  # by first unit: index within its class
        self._classes: list[list[int]] = [[] for _ in range(num_units.bit_length())]
        self._occupied = 0  # bit k: class k (2**k to 2**(k+1) - 1 units) has a run
        if num_units:
            self._insert(0, num_units)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first unit, length) of every run."""
        return iter(self._length.items())

    def add(self, first: int, length: int) -> None:
        """File a run of at least one unit that has become free, joined with its free neighbours."""
        behind = first + length
        before = self._first.get(first)
        if before is not None:
            length += self._remove(before)
            first = before
        if behind in self._length:
            length += self._remove(behind)
        self._insert(first, length)

    def take_smallest(self, limit: int) -> range:
        """Take up to ``limit`` units from the front of a run of the lowest class. There must be a run."""
        first = self._classes[(self._occupied & -self._occupied).bit_length() - 1][-1]
        length = self._remove(first)
        taken = min(limit, length)
        if taken < length:
            self._insert(first + taken, length - taken)
        return range(first, first + taken)

    def take_largest(self, limit: int) -> range:
        """Take up to ``limit`` units from the end of a run of the highest class. There must be a run."""
        return self._take_end(self._classes[self._occupied.bit_length() - 1][-1], limit)

    def take_fitting(self, count: int) -> range | None:
        """Take ``count`` units, at least 1, in one run from the end of one about as long; None where none was found."""
        size_class = count.bit_length() - 1
        if size_class >= len(self._classes):
            return None
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
