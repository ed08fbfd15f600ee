"""The adapter cache: which adapters lie in the pool, who uses them, and which one goes first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from loraplex.memory.page_pool import OutOfPages, PagePool


@dataclass(slots=True)
class _Pinned:
    """An adapter in use; a doomed one is forgotten at its last unpin."""

    pages: list[int]
    pins: int
    doomed: bool = False


class AdapterCache:
    """Adapters by identity. Pinned ones stay; idle ones stay until their pages are wanted, least recently used first.

    Attributes:
        hits: times that ``admit`` found the adapter in the pool.
        loads: times that it did not.
        evictions: adapters put out to make room.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._idle: OrderedDict[str, list[int]] = OrderedDict()
        self._pinned: dict[str, _Pinned] = {}
        self._num_idle_pages = 0
        self._num_pages = 0
        self.hits = 0
        self.loads = 0
        self.evictions = 0

    @property
    def num_pages(self) -> int:
        """Pages that adapters take, idle ones included."""
        return self._num_pages

    @property
    def num_evictable_pages(self) -> int:
        """Pages of idle adapters."""
        return self._num_idle_pages

    @property
    def resident(self) -> tuple[str, ...]:
        """Identities in the pool, least recently used first; pinned ones are the most recent."""
        return (*self._idle, *self._pinned)

    def is_resident(self, identity: str) -> bool:
        """Whether the adapter has pages in the pool."""
        return identity in self._idle or identity in self._pinned

    def pages(self, identity: str) -> list[int]:
        """Pages of a resident adapter in image order, to be read only. KeyError for one that is not resident."""
        idle = self._idle.get(identity)
        return idle if idle is not None else self._pinned[identity].pages

    def pins(self, identity: str) -> int:
        """How often the adapter is pinned."""
        pinned = self._pinned.get(identity)
        return pinned.pins if pinned else 0

    def num_evictable_beside(self, identity: str | None) -> int:
        """Pages of idle adapters other than this one."""
        return self._num_idle_pages - len(self._idle.get(identity, ())) if identity else self._num_idle_pages

    def can_admit(self, identity: str, num_pages: int) -> bool:
        """Whether ``admit`` would succeed, by putting out idle adapters if need be."""
        return self.is_resident(identity) or num_pages <= self._pool.num_free + self._num_idle_pages

    def admit(self, identity: str, num_pages: int) -> list[int] | None:
        """Make an adapter resident.

        Args:
            identity: of the adapter.
            num_pages: pages of its image, at least 1.

        Returns:
            Its new pages, into which the caller copies the image before any use; None when it was resident.

        Raises:
            OutOfPages: not even without all idle adapters is there room; nothing has changed.
        """
        if self.is_resident(identity):
            assert len(self.pages(identity)) == num_pages, f"adapter {identity} has changed its size"
            self._touch(identity)
            self.hits += 1
            return None
        if not self.make_room(num_pages):
            raise OutOfPages(
                f"adapter {identity} needs {num_pages} pages; {self._pool.num_free} are free and "
                f"{self._num_idle_pages} hold idle adapters"
            )
        pages = self._pool.allocate(num_pages, contiguous=True)
        self._idle[identity] = pages
        self._num_idle_pages += num_pages
        self._num_pages += num_pages
        self.loads += 1
        return pages

    def _touch(self, identity: str) -> None:
        if identity in self._idle:
            self._idle.move_to_end(identity)
        else:
            # Wanted again after `drop`: the identity names the content, so what lies here is still right.
            self._pinned[identity].doomed = False

    def pin(self, identity: str) -> None:
        """Keep a resident adapter until the matching ``unpin``. KeyError for one that is not resident."""
        pinned = self._pinned.get(identity)
        if pinned is not None:
            pinned.pins += 1
            return
        pages = self._idle.pop(identity)
        self._num_idle_pages -= len(pages)
        self._pinned[identity] = _Pinned(pages, pins=1)

    def unpin(self, identity: str) -> None:
        """Undo one ``pin``; at the last one the adapter is idle, and the most recently used of the idle ones."""
        pinned = self._pinned[identity]
        pinned.pins -= 1
        if pinned.pins:
            return
        del self._pinned[identity]
        self._idle[identity] = pinned.pages
        self._num_idle_pages += len(pinned.pages)
        if pinned.doomed:
            self._forget(identity)

    def make_room(self, num_pages: int) -> bool:
        """Put out idle adapters until the pool has ``num_pages`` free pages; none where that would not suffice."""
        if num_pages > self._pool.num_free + self._num_idle_pages:
            return False
        while self._pool.num_free < num_pages:
            self._forget(next(iter(self._idle)))
            self.evictions += 1
        return True

    def drop(self, identity: str) -> None:
        """Forget an adapter now if it is idle, else at its last unpin; unknown ones are ignored."""
        if identity in self._idle:
            self._forget(identity)
        elif identity in self._pinned:
            self._pinned[identity].doomed = True

    def _forget(self, identity: str) -> None:
        pages = self._idle.pop(identity)
        self._num_idle_pages -= len(pages)
        self._num_pages -= len(pages)
        self._pool.release(pages)

    def check_integrity(self) -> None:
        """AssertionError where the adapters' pages, the counts here and the pool's counts disagree."""
        assert not self._idle.keys() & self._pinned.keys()
        assert all(pinned.pins > 0 for pinned in self._pinned.values())
        assert self._num_idle_pages == sum(map(len, self._idle.values()))
        pages = [page for identity in self.resident for page in self.pages(identity)]
        assert len(set(pages)) == len(pages) == self._num_pages
        assert all(self._pool.refcount(page) == 1 for page in pages), "somebody else holds an adapter's page"
