"""What could be done without, and which of it goes first when room is wanted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol


class Evictable(Protocol):
    """An owner of things that it can do without."""

    def put_out(self, key: Hashable) -> None:
        """Give up the room of a thing, which is out of the order already."""


class EvictionOrder(Protocol):
    """Things that could go, each with the room that it takes, in pages or in bytes."""

    @property
    def size(self) -> int:
        """Room that all of them take."""

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """All of them, the first to go first. Costs time in proportion to their number; for checks."""

    @property
    def least_worth(self) -> float:
        """Worth of the one that goes first; infinity where there is none."""

    def __contains__(self, key: Hashable) -> bool: ...

    def add(self, key: Hashable, size: int, owner: Evictable, worth: float) -> None:
        """Something could go from now on.

        Args:
            key: distinct from those of all other owners.
            size: room that going makes.
            owner: told when it goes.
            worth: of keeping it, for its size, on a scale that does not change with time (see ``arrival_rates.py``).
        """

    def revalue(self, key: Hashable, worth: float) -> None:
        """What something is worth has changed, not when it was added. KeyError if it is not here."""

    def discard(self, key: Hashable) -> None:
        """Something is in use again, or gone. KeyError if it is not here."""

    def put_out_first(self) -> Hashable:
        """Have its owner put out what goes first, and return its key. There must be something."""


class LruOrder:
    """What was added longest ago goes first, whatever it is worth."""

    def __init__(self) -> None:
        self._things: OrderedDict[Hashable, tuple[Evictable, int]] = OrderedDict()
        self._size = 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._things)

    @property
    def least_worth(self) -> float:
        return float("-inf") if self._things else float("inf")

    def __contains__(self, key: Hashable) -> bool:
        return key in self._things

    def add(self, key: Hashable, size: int, owner: Evictable, worth: float) -> None:
        del worth
        assert key not in self._things, f"{key!r} is here already"
        self._things[key] = owner, size
        self._size += size

    def revalue(self, key: Hashable, worth: float) -> None:
        del worth
        if key not in self._things:
            raise KeyError(key)

    def discard(self, key: Hashable) -> None:
        self._size -= self._things.pop(key)[1]

    def put_out_first(self) -> Hashable:
        key, (owner, size) = self._things.popitem(last=False)
        self._size -= size
        owner.put_out(key)
        return key


class ValueOrder:
    """What is worth least goes first; among equals, what was added longest ago.

    A heap whose entries outlive what they stand for, until they come up or make up most of it.
    """

    def __init__(self) -> None:
        self._things: dict[Hashable, tuple[Evictable, int, float, int]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = count()
        self._size = 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(sorted(self._things, key=lambda key: self._things[key][2:]))

    @property
    def least_worth(self) -> float:
        self._drop_stale()
        return self._heap[0][0] if self._heap else float("inf")

    def __contains__(self, key: Hashable) -> bool:
        return key in self._things

    def add(self, key: Hashable, size: int, owner: Evictable, worth: float) -> None:
        assert key not in self._things, f"{key!r} is here already"
        number = next(self._count)
        self._things[key] = owner, size, worth, number
        self._size += size
        self._file(worth, number, key)

    def revalue(self, key: Hashable, worth: float) -> None:
        owner, size, before, number = self._things[key]
        if worth != before:
            self._things[key] = owner, size, worth, number
            self._file(worth, number, key)

    def discard(self, key: Hashable) -> None:
        self._size -= self._things.pop(key)[1]

    def put_out_first(self) -> Hashable:
        self._drop_stale()
        _, _, key = heappop(self._heap)
        owner, size, _, _ = self._things.pop(key)
        self._size -= size
        owner.put_out(key)
        return key

    def _file(self, worth: float, number: int, key: Hashable) -> None:
        if len(self._heap) > 2 * len(self._things) + 64:
            self._heap = [(entry[2], entry[3], known) for known, entry in self._things.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (worth, number, key))

    def _drop_stale(self) -> None:
        while self._heap:
            worth, number, key = self._heap[0]
            thing = self._things.get(key)
            if thing is not None and thing[2:] == (worth, number):
                return
            heappop(self._heap)
