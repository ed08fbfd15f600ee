"""Who waits for which registration's image, so that it stays from the moment it is here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from loraplex.memory.store_states import Key


class Holds:
    """Counts by registration, and which of them have pinned an image.

    Changes need the store's lock; questions are answered without it.
    """

    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()
        self._pinned: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def has_pinned(self, key: Key) -> bool:
        """Whether the image of a registration is pinned on behalf of who waits for it."""
        return key in self._pinned

    @property
    def pinned(self) -> Collection[Key]:
        """Registrations for which an image is pinned, as of now."""
        return tuple(self._pinned)

    def add(self, key: Key) -> None:
        """One more waits."""
        self._counts[key] += 1

    def discard(self, key: Key) -> bool:
        """Undo one ``add``; True if the image is to be unpinned now."""
        assert self._counts[key] > 0, "released more often than held"
        self._counts[key] -= 1
        if self._counts[key]:
            return False
        del self._counts[key]
        is_last = key in self._pinned
        self._pinned.discard(key)
        return is_last

    def begin(self, key: Key) -> bool:
        """An image is here; True if it is to be pinned now."""
        if key not in self._counts or key in self._pinned:
            return False
        self._pinned.add(key)
        return True

    def check_integrity(self) -> None:
        """AssertionError where an image is pinned for nobody."""
        assert all(count > 0 for count in self._counts.values())
        assert self._pinned <= self._counts.keys()
