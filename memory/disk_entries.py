"""Which remote adapters are on the disk, the room that they take, and which of them goes first."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraplex.memory.adapter_errors import TransientReadError
from loraplex.memory.arrival_rates import NEVER, ArrivalRates, worth_of
from loraplex.memory.disk_folder import CacheFolder, EntryRecord
from loraplex.memory.eviction_order import EvictionOrder

_log = logging.getLogger(__name__)

_SHORTEST_SECONDS = 1e-3  # below, a clock's steps would decide what a fetch costs


@dataclass(slots=True, eq=False)
class _Entry:
    """An adapter that is here.

    Attributes:
        restored: weight of its last use in an earlier run or by another process, as a logarithm.
        users: who reads it in this process.
        replaced: whether its source stands for other files by now.
    """

    record: EntryRecord
    restored: float = NEVER
    users: int = 0
    replaced: bool = False

    @property
    def size(self) -> int:
        return max(1, self.record.num_bytes)


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """An entry that stays until it is let go; ``descriptor`` holds its lock."""

    name: str
    path: Path
    descriptor: int


class DiskEntries:
    """The entries of a cache folder. Called by one thread at a time; other processes may change the folder meanwhile.

    Args:
        folder: where they are.
        byte_limit: budget of the adapters' own files, those on their way included, over all processes.
        order: of eviction.
        memory_seconds, clock: as in ``ArrivalRates``.

    Attributes:
        num_bytes: of all entries.
        evictions: entries removed, by reason.

    Errors: OSError where the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: CacheFolder,
        byte_limit: int,
        order: EvictionOrder,
        *,
        memory_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_bytes = 0
        self.evictions: Counter[str] = Counter()
        self._folder, self._byte_limit, self._order = folder, byte_limit, order
        self._memory_seconds = memory_seconds
        self._rates = ArrivalRates(memory_seconds, clock=clock)
        self._entries: dict[str, _Entry] = {}
        self._by_url: dict[str, str] = {}
        self._pending: dict[str, int] = {}
        self._stuck: list[str] = []
        self._reason = "room"
        self._inside = False
        with self.changing():
            self._evict(lambda: self._excess(0) > 0)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pending_bytes(self) -> int:
        """That are being fetched."""
        return sum(self._pending.values())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other processes out, once what they have changed is known here."""
        if self._inside:
            yield
            return
        with self._folder.changing() as others_changed:
            self._inside = True
            try:
                if others_changed:
                    self._learn()
                yield
            finally:
                self._inside = False

    def note(self, url: str) -> None:
        """A source is wanted once more."""
        self._rates.note(url)

    def version(self, url: str) -> str | None:
        """Of what is here of a source; None if nothing is."""
        name = self._by_url.get(url)
        return None if name is None else self._entries[name].record.version

    def hold(self, url: str) -> HeldEntry | None:
        """Hold what is here of a source; None if nothing is, or if it is not as recorded and was removed."""
        name = self._by_url.get(url)
        if name is None:
            return None
        entry = self._entries[name]
        descriptor = self._folder.share(entry.record)
        if descriptor is None:
            self._drop_damaged(name)
            return None
        if entry.users == 0:
            self._order.discard(name)
        entry.users += 1
        return HeldEntry(name, self._folder.path(name), descriptor)

    def let_go(self, held: HeldEntry) -> None:
        """It may go from now on, if nobody else holds it."""
        os.close(held.descriptor)
        entry = self._entries[held.name]
        entry.users -= 1
        if entry.users == 0:
            self._add_to_order(held.name)

    def begin(self, record: EntryRecord) -> Path:
        """Make room for an entry, and a folder to fetch it to; within ``CacheFolder.fetching``.

        Errors: TransientReadError if what is in use leaves no room.
        """
        with self.changing():
            for name in self._folder.clear_pending(record.url):
                self._pending.pop(name, None)
            self._make_room(record.num_bytes)
            self._pending[record.name] = record.num_bytes
            return self._folder.begin(record)

    def abandon(self, record: EntryRecord) -> None:
        """An entry that was begun will not come."""
        with suppress(OSError), self.changing():
            self._folder.abandon(record.name)
        self._pending.pop(record.name, None)

    def finish(self, record: EntryRecord) -> HeldEntry:
        """An entry is complete and sealed: it appears, held, in place of what was here of its source."""
        with self.changing():
            self._folder.commit(record.name)
            self._pending.pop(record.name, None)
            self._know(_Entry(record))
            held = self.hold(record.url)
            assert held is not None, "an entry went while others were kept out"
            return held

    def free(self, num_bytes: int) -> bool:
        """Evict about so many bytes because the disk is full; False if there is nothing to evict."""
        with self.changing():
            before = self.num_bytes
            self._reason = "disk_full"
            self._evict(lambda: before - self.num_bytes < num_bytes)
            self._reason = "room"
            return self.num_bytes < before

    def put_out(self, key: Hashable) -> None:
        """Remove an entry, as the order says; one that another process reads, or that cannot be removed, stays."""
        name = str(key)
        try:
            gone = self._folder.remove(name)
        except OSError as error:
            _log.warning("%s: cannot be removed from the disk cache: %s", name, error.strerror)
            gone = False
        if not gone:
            self._stuck.append(name)
            return
        self.evictions["replaced" if self._entries[name].replaced else self._reason] += 1
        self._forget(name)

    def check_integrity(self) -> None:
        """Compare what is known with the disk; AssertionError where they differ. Reads every entry's record."""
        with self.changing():
            assert self._folder.names() == set(self._entries), "entries that are not known, or not there"
            for name, entry in self._entries.items():
                found = self._folder.read(name)
                assert found is not None, f"{name}: not as recorded"
                assert found[0] == entry.record, f"{name}: another record"
                assert (name in self._order) == (entry.users == 0), f"{name}: in use and to go, or neither"
                current = self._by_url.get(entry.record.url) == name
                assert current != entry.replaced, f"{name}: replaced and current, or neither"
            assert set(self._by_url.values()) <= self._entries.keys(), "a source without its entry"
            assert self._pending == self._folder.pending(), "fetches that are not known, or not there"
            assert self.num_bytes == sum(entry.record.num_bytes for entry in self._entries.values()), "bytes"
            idle = sum(entry.size for entry in self._entries.values() if not entry.users)
            assert self._order.size == idle, "the order's size"
            assert self._excess(0) <= 0, "over the budget"

    def _drop_damaged(self, name: str) -> None:
        """What is gone or not as recorded is not served again; what somebody reads nevertheless goes after that."""
        entry = self._entries[name]
        if self._folder.path(name).exists():
            _log.warning("%s: the disk cache's files are not as recorded; fetched again", entry.record.url)
        self._replace(name)
        if entry.users == 0:
            with self.changing():
                if name in self._order:
                    self._order.discard(name)
                    self.put_out(name)
                    self._put_back()

    def _replace(self, name: str) -> None:
        """An entry's source stands for something else: it goes first."""
        entry = self._entries[name]
        entry.replaced = True
        self._by_url.pop(entry.record.url, None)
        if entry.users == 0:
            self._order.discard(name)
            self._add_to_order(name)

    def _know(self, entry: _Entry) -> None:
        """Take up an entry that nobody here uses, in place of what is known of its source."""
        name, url = entry.record.name, entry.record.url
        if url in self._by_url:
            self._replace(self._by_url[url])
        self._entries[name] = entry
        self._by_url[url] = name
        self.num_bytes += entry.record.num_bytes
        self._add_to_order(name)

    def _add_to_order(self, name: str) -> None:
        entry = self._entries[name]
        self._order.add(name, entry.size, self, self._worth(entry))

    def _worth(self, entry: _Entry) -> float:
        if entry.replaced:
            return -math.inf
        weight = max(entry.restored, self._rates.log_weight(entry.record.url))
        return worth_of(max(entry.record.fetch_seconds, _SHORTEST_SECONDS), weight, entry.size)

    def _forget(self, name: str) -> None:
        record = self._entries.pop(name).record
        self.num_bytes -= record.num_bytes
        if self._by_url.get(record.url) == name:
            del self._by_url[record.url]

    def _make_room(self, num_bytes: int) -> None:
        if self._excess(num_bytes) > self._order.size:
            # Fetches of a process that was killed may count still.
            self._pending = self._folder.pending()
        if self._excess(num_bytes) <= self._order.size:
            self._evict(lambda: self._excess(num_bytes) > 0)
        if self._excess(num_bytes) > 0:
            raise TransientReadError(
                f"{self._folder.root}: no room in the disk cache for {num_bytes} bytes beside what is in use; "
                "with more disk_cache_bytes more can be in use at once"
            )

    def _excess(self, num_bytes: int) -> int:
        """Bytes above the budget if so many more are here."""
        return self.num_bytes + self.pending_bytes + num_bytes - self._byte_limit

    def _evict(self, wanted: Callable[[], bool]) -> None:
        while self._order.size and wanted():
            self._order.put_out_first()
        self._put_back()

    def _put_back(self) -> None:
        stuck, self._stuck = self._stuck, []
        for name in stuck:
            self._add_to_order(name)

    def _learn(self) -> None:
        """Take up entries that are on the disk and not known, and forget those that are gone."""
        names = self._folder.names()
        for name in [name for name, entry in self._entries.items() if name not in names and not entry.users]:
            self._order.discard(name)
            self._forget(name)
        unknown = []
        for name in names - self._entries.keys():
            found = self._folder.read(name)
            if found is None:
                self._folder.remove(name)
            else:
                unknown.append(found)
        # Of two versions of a source, the one that was used last is served until the remote was asked.
        for record, used in sorted(unknown, key=lambda found: found[1]):
            age = max(0.0, time.time() - used)
            self._know(_Entry(record, self._rates.one_more(NEVER) - age / self._memory_seconds))
        self._pending = self._folder.pending()
