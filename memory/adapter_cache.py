"""The adapter cache: which adapters lie in the pool, who uses them, and which one goes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from loraplex.memory.arrival_rates import NEVER, ArrivalRates, worth_of
from loraplex.memory.page_pool import OutOfPages, PagePool


@dataclass(slots=True)
class _Pinned:
    """An adapter in use; a doomed one is forgotten at its last unpin."""

    pages: list[int]
    pins: int
    doomed: bool = False


class AdapterCache:
    """Adapters by identity. Pinned ones stay; idle ones stay until their pages are wanted (see ``eviction_order.py``).

    ``pin`` is for those who compute with an adapter, ``keep`` for an operator who wants it resident. Idle adapters that
    are kept lie in ``pool.kept``; they go at any price only, and are in ``missing_kept`` until they are admitted again.

    Args:
        pool: that the pages are of.
        rates: how often each identity is wanted; what has never been comes in as wanted once. Without rates every idle
            adapter is worth the same.
        rebuild_seconds: to have an adapter in the pool again if it were put out now, by identity and pages; without
            it, 1.

    Attributes:
        hits: times that ``admit`` found the adapter in the pool.
        loads: times that it did not.
        evictions_by_reason: adapters that have left the pool: for "room", for room though kept at any "price", or
            "dropped" by name.
    """

    def __init__(
        self,
        pool: PagePool,
        rates: ArrivalRates | None = None,
        rebuild_seconds: Callable[[str, int], float] | None = None,
    ) -> None:
        self._pool = pool
        self._rates = rates
        self._rebuild_seconds = rebuild_seconds
        self._idle: dict[str, list[int]] = {}  # the least recently used first; kept ones too
        self._pinned: dict[str, _Pinned] = {}
        self._wanted_kept: dict[str, set[str]] = {}  # and by whom, in the order of ``keep``; resident or not
        self._missing_kept: dict[str, None] = {}
        self._num_evictable = 0
        self._num_pages = 0
        self._changes: set[str] = set()
        self.hits = 0
        self.loads = 0
        self.evictions_by_reason: Counter[str] = Counter()

    @property
    def evictions(self) -> int:
        """Adapters put out to make room, kept ones included."""
        return self.evictions_by_reason["room"] + self.evictions_by_reason["price"]

    @property
    def num_pages(self) -> int:
        """Pages that adapters take, idle ones included."""
        return self._num_pages

    @property
    def num_evictable_pages(self) -> int:
        """Pages of idle adapters that are not kept."""
        return self._num_evictable

    @property
    def resident(self) -> tuple[str, ...]:
        """Identities in the pool, least recently used first; pinned ones are the most recent."""
        return (*self._idle, *self._pinned)

    @property
    def kept(self) -> tuple[str, ...]:
        """Resident adapters that an operator wants kept."""
        return tuple(identity for identity in self._wanted_kept if self.is_resident(identity))

    @property
    def missing_kept(self) -> tuple[str, ...]:
        """Adapters that an operator wants kept and that are not resident: to be paged in when there is room."""
        return tuple(self._missing_kept)

    @property
    def kept_pages(self) -> int:
        """Pages of the adapters in ``kept``, whether in use or not."""
        return sum(len(self.pages(identity)) for identity in self.kept)

    def is_resident(self, identity: str) -> bool:
        """Whether the adapter has pages in the pool."""
        return identity in self._idle or identity in self._pinned

    def is_kept(self, identity: str) -> bool:
        """Whether an operator wants the adapter kept, resident or not."""
        return identity in self._wanted_kept

    def pages(self, identity: str) -> list[int]:
        """Pages of a resident adapter in image order, to be read only. KeyError for one that is not resident."""
        idle = self._idle.get(identity)
        return idle if idle is not None else self._pinned[identity].pages

    def pins(self, identity: str) -> int:
        """How often the adapter is pinned."""
        pinned = self._pinned.get(identity)
        return pinned.pins if pinned else 0

    def num_evictable_of(self, identities: Iterable[str]) -> int:
        """Pages of those among these adapters that are idle and not kept: their part of ``pool.num_reachable``."""
        return sum(len(self._idle.get(name, ())) for name in identities if name not in self._wanted_kept)

    def num_evictable_alone_of(self, identities: Iterable[str]) -> int:
        """Pages of those among these adapters that are idle: their part of ``pool.num_reachable_alone``."""
        return sum(len(self._idle.get(name, ())) for name in identities)

    def can_admit(self, identity: str, num_pages: int, *, at_any_price: bool = False) -> bool:
        """Whether ``admit`` would succeed, by putting out what is idle if need be."""
        reachable = self._pool.num_reachable_alone if at_any_price else self._pool.num_reachable
        return self.is_resident(identity) or num_pages <= reachable

    def admit(self, identity: str, num_pages: int, *, at_any_price: bool = False) -> list[int] | None:
        """Make an adapter resident.

        Args:
            identity: of the adapter.
            num_pages: pages of its image, at least 1.
            at_any_price: put out what is kept, too, when nothing idle is left.

        Returns:
            Its new pages, into which the caller copies the image before any use; None when it was resident.

        Raises:
            OutOfPages: not even without all that may be put out is there room; nothing has changed.
        """
        if self.is_resident(identity):
            assert len(self.pages(identity)) == num_pages, f"adapter {identity} has changed its size"
            self._touch(identity)
            self.hits += 1
            return None
        if not self._pool.make_room(num_pages, at_any_price=at_any_price):
            raise OutOfPages(
                f"adapter {identity} needs {num_pages} pages; {self._pool.num_free} are free, "
                f"{self._pool.idle.size} hold what is idle and {self._pool.kept.size} what is kept"
            )
        pages = self._pool.allocate(num_pages, contiguous=True)
        self._num_pages += num_pages
        self._missing_kept.pop(identity, None)
        self.loads += 1
        self._changes.add(identity)
        if self._rates is not None and self._rates.log_weight(identity) == NEVER:
            self._rates.note(identity)  # no request has come for it: somebody has had it fetched beforehand
        self._add_idle(identity, pages)
        return pages

    def _worth(self, identity: str, num_pages: int) -> float:
        if self._rates is None:
            return 0.0
        seconds = 1.0 if self._rebuild_seconds is None else self._rebuild_seconds(identity, num_pages)
        return worth_of(seconds, self._rates.log_weight(identity), num_pages)

    def _add_idle(self, identity: str, pages: list[int]) -> None:
        self._idle[identity] = pages
        if identity in self._wanted_kept:
            self._pool.kept.add(identity, len(pages), self, 0.0)
        else:
            self._num_evictable += len(pages)
            self._pool.idle.add(identity, len(pages), self, self._worth(identity, len(pages)))

    def _remove_idle(self, identity: str) -> list[int]:
        pages = self._idle.pop(identity)
        if identity in self._wanted_kept:
            self._pool.kept.discard(identity)
        else:
            self._num_evictable -= len(pages)
            self._pool.idle.discard(identity)
        return pages

    def _touch(self, identity: str) -> None:
        if identity in self._idle:
            self._add_idle(identity, self._remove_idle(identity))
        else:
            # Wanted again after `drop`: the identity names the content, so what lies here is still right.
            self._pinned[identity].doomed = False

    def rescore(self, identity: str) -> None:
        """To have an adapter again costs more or less than it did: its host copy came or went. Not a use of it."""
        if identity in self._pool.idle:
            self._pool.idle.revalue(identity, self._worth(identity, len(self._idle[identity])))

    def keep(self, identity: str, by: str = "") -> None:
        """An operator, or whoever else, wants the adapter resident, now if it is, else from its next admission on."""
        if identity not in self._wanted_kept:
            self._file_anew(identity, kept=True)
        self._wanted_kept[identity].add(by)

    def unkeep(self, identity: str, by: str = "") -> None:
        """Undo ``keep``; unknown ones are ignored."""
        wanted_by = self._wanted_kept.get(identity, set())
        if by in wanted_by:
            wanted_by.remove(by)
            if not wanted_by:
                self._file_anew(identity, kept=False)

    def _file_anew(self, identity: str, *, kept: bool) -> None:
        pages = self._remove_idle(identity) if identity in self._idle else None
        if kept:
            self._wanted_kept[identity] = set()
            if pages is None and identity not in self._pinned:
                self._missing_kept[identity] = None
        else:
            del self._wanted_kept[identity]
            self._missing_kept.pop(identity, None)
        if pages is not None:
            self._add_idle(identity, pages)

    def pin(self, identity: str) -> None:
        """Hold a resident adapter until the matching ``unpin``. KeyError for one that is not resident."""
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
        if pinned.doomed:
            self._forget(identity, pinned.pages, "dropped")
        else:
            self._add_idle(identity, pinned.pages)

    def drop(self, identity: str) -> None:
        """Forget an adapter now if it is idle, else at its last unpin; unknown ones are ignored.

        What lies in its pages may be wrong, or its name is gone. That an operator wants it kept is not forgotten.
        """
        if identity in self._idle:
            self._forget(identity, self._remove_idle(identity), "dropped")
        elif identity in self._pinned:
            self._pinned[identity].doomed = True

    def put_out(self, key: Hashable) -> None:
        """Give up an idle adapter, for the order that it was in."""
        assert isinstance(key, str)
        pages = self._idle.pop(key)
        kept = key in self._wanted_kept
        self._num_evictable -= 0 if kept else len(pages)
        self._forget(key, pages, "price" if kept else "room")

    def _forget(self, identity: str, pages: list[int], reason: str) -> None:
        self._num_pages -= len(pages)
        self._pool.release(pages)
        self._changes.add(identity)
        if identity in self._wanted_kept:
            self._missing_kept[identity] = None
        self.evictions_by_reason[reason] += 1

    def take_changes(self) -> set[str]:
        """Identities that have entered or left the pool since the last call; some may have done both."""
        changes, self._changes = self._changes, set()
        return changes

    def check_integrity(self) -> None:
        """AssertionError where the adapters' pages, the counts here and the pool's counts disagree."""
        missing = [identity for identity in self._wanted_kept if not self.is_resident(identity)]
        assert sorted(missing) == sorted(self._missing_kept)
        assert all(self._wanted_kept.values())
        assert not self._idle.keys() & self._pinned.keys()
        idle = {identity: len(pages) for identity, pages in self._idle.items()}
        kept = {identity for identity in idle if identity in self._wanted_kept}
        assert {key for key in self._pool.idle.keys if isinstance(key, str)} == idle.keys() - kept
        assert set(self._pool.kept.keys) == kept
        assert self._pool.kept.size == sum(idle[identity] for identity in kept)
        assert self._num_evictable == sum(idle.values()) - self._pool.kept.size
        assert all(pinned.pins > 0 for pinned in self._pinned.values())
        pages = [page for identity in self.resident for page in self.pages(identity)]
        assert len(set(pages)) == len(pages) == self._num_pages
        assert all(self._pool.refcount(page) == 1 for page in pages), "somebody else holds an adapter's page"
