"""The adapter cache: which adapters lie in the pool, who uses them, and which one goes first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from loraplex.memory.page_pool import OutOfPages, PagePool


@dataclass(slots=True)
class _Pinned:
    """An adapter in use; a doomed one is forgotten at its last unpin."""

    pages: list[int]
    pins: int
    doomed: bool = False


class AdapterCache:
    """Adapters by identity. Pinned ones stay; idle ones stay until their pages are wanted (see ``IdleOrder``).

    Attributes:
        hits: times that ``admit`` found the adapter in the pool.
        loads: times that it did not.
        evictions: adapters put out to make room.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._idle: dict[str, list[int]] = {}  # the least recently used first
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

    def num_evictable_of(self, identities: Iterable[str]) -> int:
        """Pages of those among these adapters that are idle."""
        return sum(len(self._idle.get(identity, ())) for identity in identities)

    def can_admit(self, identity: str, num_pages: int) -> bool:
        """Whether ``admit`` would succeed, by putting out what is idle if need be."""
        return self.is_resident(identity) or num_pages <= self._pool.num_reachable

    def admit(self, identity: str, num_pages: int) -> list[int] | None:
        """Make an adapter resident.

        Args:
            identity: of the adapter.
            num_pages: pages of its image, at least 1.

        Returns:
            Its new pages, into which the caller copies the image before any use; None when it was resident.

        Raises:
            OutOfPages: not even without all that is idle is there room; nothing has changed.
        """
        if self.is_resident(identity):
            assert len(self.pages(identity)) == num_pages, f"adapter {identity} has changed its size"
            self._touch(identity)
            self.hits += 1
            return None
        if not self._pool.make_room(num_pages):
            raise OutOfPages(
                f"adapter {identity} needs {num_pages} pages; {self._pool.num_free} are free and "
                f"{self._pool.idle.num_pages} hold what is idle"
            )
        pages = self._pool.allocate(num_pages, contiguous=True)
        self._num_pages += num_pages
        self.loads += 1
        self._add_idle(identity, pages)
        return pages

    def _add_idle(self, identity: str, pages: list[int]) -> None:
        self._idle[identity] = pages
        self._num_idle_pages += len(pages)
        self._pool.idle.add(identity, len(pages), self)

    def _remove_idle(self, identity: str) -> list[int]:
        self._pool.idle.discard(identity)
        pages = self._idle.pop(identity)
        self._num_idle_pages -= len(pages)
        return pages

    def _touch(self, identity: str) -> None:
        if identity in self._idle:
            self._idle[identity] = self._idle.pop(identity)
            self._pool.idle.touch(identity)
        else:
            # Wanted again after `drop`: the identity names the content, so what lies here is still right.
            self._pinned[identity].doomed = False

    def pin(self, identity: str) -> None:
        """Keep a resident adapter until the matching ``unpin``. KeyError for one that is not resident."""
        pinned = self._pinned.get(identity)
        if pinned is not None:
            pinned.pins += 1
            return
        self._pinned[identity] = _Pinned(self._remove_idle(identity), pins=1)

    def unpin(self, identity: str) -> None:
        """Undo one ``pin``; at the last one the adapter is idle, and the most recently used of the idle ones."""
        pinned = self._pinned[identity]
        pinned.pins -= 1
        if pinned.pins:
            return
        del self._pinned[identity]
        self._add_idle(identity, pinned.pages)
        if pinned.doomed:
            self.drop(identity)

    def drop(self, identity: str) -> None:
        """Forget an adapter now if it is idle, else at its last unpin; unknown ones are ignored."""
        if identity in self._idle:
            self._forget(self._remove_idle(identity))
        elif identity in self._pinned:
            self._pinned[identity].doomed = True

    def put_out(self, key: Hashable) -> None:
        """Give up an idle adapter, for ``IdleOrder``."""
        assert isinstance(key, str)
        pages = self._idle.pop(key)
        self._num_idle_pages -= len(pages)
        self._forget(pages)
        self.evictions += 1

    def _forget(self, pages: list[int]) -> None:
        self._num_pages -= len(pages)
        self._pool.release(pages)

    def check_integrity(self) -> None:
        """AssertionError where the adapters' pages, the counts here and the pool's counts disagree."""
        assert not self._idle.keys() & self._pinned.keys()
        assert [key for key in self._pool.idle.keys if isinstance(key, str)] == list(self._idle)
        assert all(pinned.pins > 0 for pinned in self._pinned.values())
        assert self._num_idle_pages == sum(map(len, self._idle.values()))
        pages = [page for identity in self.resident for page in self.pages(identity)]
        assert len(set(pages)) == len(pages) == self._num_pages
        assert all(self._pool.refcount(page) == 1 for page in pages), "somebody else holds an adapter's page"
