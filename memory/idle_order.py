"""What lies in the pool though nobody uses it, and which of it goes first when pages are wanted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol


class IdleOwner(Protocol):
    """An owner of pages that it can do without."""

    def put_out(self, key: Hashable) -> None:
        """Release the pages of an idle thing, which is out of the order already."""


class IdleOrder:
    """Idle adapters and cached K/V pages in one order: what has been idle for longest goes first.

    Attributes:
        num_pages: pages of all that is idle.
    """

    def __init__(self) -> None:
        self._idle: OrderedDict[Hashable, tuple[IdleOwner, int]] = OrderedDict()
        self.num_pages = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._idle

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """All that is idle, the first to go first."""
        return tuple(self._idle)

    def add(self, key: Hashable, num_pages: int, owner: IdleOwner) -> None:
        """Something is idle from now on; keys of all owners are distinct."""
        assert key not in self._idle, f"{key!r} is idle already"
        self._idle[key] = owner, num_pages
        self.num_pages += num_pages

    def discard(self, key: Hashable) -> None:
        """Something is in use again, or gone. KeyError if it was not idle."""
        self.num_pages -= self._idle.pop(key)[1]

    def touch(self, key: Hashable) -> None:
        """Something idle was wanted: it is the last to go now."""
        self._idle.move_to_end(key)

    def put_out_first(self) -> None:
        """Have its owner put out what is to go first. There must be something."""
        key, (owner, num_pages) = self._idle.popitem(last=False)
        self.num_pages -= num_pages
        owner.put_out(key)
