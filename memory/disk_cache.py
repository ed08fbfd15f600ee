"""The disk cache: remote adapters as local folders, within a budget of bytes, the least valuable out first."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.disk_entries import DiskEntries, HeldEntry
from loraplex.memory.disk_faults import disk_error, is_full
from loraplex.memory.disk_folder import CacheFolder, EntryRecord
from loraplex.memory.eviction_order import EvictionOrder, ValueOrder
from loraplex.memory.source_remote import Remote, RemoteListing

_log = logging.getLogger(__name__)

_MAX_RECENT = 1000

_AWAY_SECONDS = 30.0
"""For so long after a remote could not be reached it is not asked about what is here."""


@dataclass(frozen=True, slots=True)
class DiskCacheStats:
    """A snapshot. Counters run since the cache was opened; a hit is an ``open`` that fetched nothing.

    Attributes:
        entries, num_bytes: of adapters that are here.
        pending_bytes: that are being fetched; they count towards the limit.
        evictions: adapters removed, by reason: ``room`` (for another), ``replaced`` (by a newer version, or because
            its files were not as recorded), ``disk_full``.
    """

    entries: int
    num_bytes: int
    pending_bytes: int
    byte_limit: int
    hits: int
    misses: int
    evictions: Mapping[str, int]


class DiskCache:
    """Fetches remote adapters to a folder and keeps them. Used by several threads, and by several processes at once.

    Files appear complete or not at all, whenever the process is killed. A source is fetched by one thread of all
    processes at a time. What is open stays; the rest goes by worth: (seconds to fetch x chance of being wanted again)
    per byte. The budget holds at every moment, over all processes, for the adapters' own files.

    Args:
        root: folder of the cache, for nothing else; made if absent.
        byte_limit: budget of all adapters together.
        remote: what is asked for files.
        order: of eviction; by worth if None.
        check_seconds: for so long after the remote was asked for a source's version, it is not asked again; infinity is
            never, but for ``expire``.
        memory_seconds: as in ``ArrivalRates``.
        clock: monotonic seconds.

    Errors: AdapterFileError naming ``cache_dir`` if the folder cannot be used.
    """

    def __init__(
        self,
        root: Path,
        byte_limit: int,
        remote: Remote,
        *,
        order: EvictionOrder | None = None,
        check_seconds: float = 60.0,
        memory_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.byte_limit = byte_limit
        self._root, self._remote, self._clock, self._check_seconds = root, remote, clock, check_seconds
        self._lock = threading.Lock()
        self._checked: dict[str, float] = {}
        self._away: dict[tuple[str, str], float] = {}  # remotes that could not be reached, and when
        self._expired: set[str] = set()
        self._hits = self._misses = 0
        self._recent: deque[float] = deque(maxlen=_MAX_RECENT)
        self._fetches: OrderedDict[str, tuple[float, float]] = OrderedDict()
        with self._disk_faults():
            self._folder = CacheFolder(root)
            self._entries = DiskEntries(
                self._folder,
                byte_limit,
                ValueOrder() if order is None else order,
                memory_seconds=memory_seconds,
                clock=clock,
            )

    @contextmanager
    def open(self, source: AdapterSource) -> Iterator[Path]:
        """A folder with an adapter's files, which stays as it is until the context is left.

        What is here is served while the remote cannot be reached, unless ``expire`` was called since it last was. One
        adapter waits for a remote that is away; for some seconds after that, the others on it do not.

        Errors: TransientReadError for faults that may pass; AdapterFileError for those that will not, for an adapter
        larger than the budget (key ``bytes``), and for a disk that is full or cannot be written.
        """
        if not source.is_remote:
            yield Path(source.place)
            return
        with self._disk_faults():
            held = self._acquire(source)
        try:
            yield held.path
        finally:
            with self._lock:
                self._entries.let_go(held)

    def expire(self, source: AdapterSource) -> None:
        """Have the next ``open`` ask the remote for the version, as it must when somebody asks for a reload."""
        with self._lock:
            self._expired.add(source.url)

    def stats(self) -> DiskCacheStats:
        with self._lock:
            return DiskCacheStats(
                entries=len(self._entries),
                num_bytes=self._entries.num_bytes,
                pending_bytes=self._entries.pending_bytes,
                byte_limit=self.byte_limit,
                hits=self._hits,
                misses=self._misses,
                evictions=dict(self._entries.evictions),
            )

    def take_recent(self) -> list[float]:
        """Seconds of each fetch that ended since the last call, of at most the latest thousand."""
        with self._lock:
            recent = list(self._recent)
            self._recent.clear()
            return recent

    def last_fetch(self, source: AdapterSource) -> tuple[float, float] | None:
        """When the latest fetch of a source began and ended, on the cache's clock; None if that is long ago."""
        with self._lock:
            return self._fetches.get(source.url)

    def check_integrity(self) -> None:
        """Compare what is known with the disk; AssertionError where they differ. Reads every entry's record."""
        with self._lock:
            self._entries.check_integrity()

    def _acquire(self, source: AdapterSource) -> HeldEntry:
        url = source.url
        with self._lock:
            self._entries.note(url)
            held = self._hold_checked(source)
        if held is not None:
            return held
        with self._folder.fetching(url):
            # Whoever was waited for may have fetched it.
            with self._lock, self._entries.changing():
                held = self._hold_checked(source)
            if held is not None:
                return held
            listing = self._ask(source)
            with self._lock:
                held = self._hold(url, None if listing is None else listing.version)
            if held is not None:
                return held
            return self._fetch(source, listing or self._remote.list_files(source))

    def _hold_checked(self, source: AdapterSource) -> HeldEntry | None:
        """Hold what is here of a source whose version was asked for lately, or cannot be asked for at present."""
        url = source.url
        if url in self._expired:
            return None
        checked = self._checked.get(url)
        is_due = checked is None or self._clock() - checked >= self._check_seconds
        # Who never asks again on its own does not ask either for what it finds at its start.
        if is_due and not math.isinf(self._check_seconds) and not self._is_away(source):
            return None
        return self._hold(url, None)

    def _is_away(self, source: AdapterSource) -> bool:
        since = self._away.get(_server_of(source))
        return since is not None and self._clock() - since < _AWAY_SECONDS

    def _hold(self, url: str, version: str | None) -> HeldEntry | None:
        """Hold what is here of a source if it has this version, or if any will do."""
        if version is not None and self._entries.version(url) != version:
            return None
        held = self._entries.hold(url)
        self._hits += held is not None
        return held

    def _ask(self, source: AdapterSource) -> RemoteListing | None:
        """What the remote has; None if it cannot be reached and what is here will do."""
        url = source.url
        with self._lock:
            was_expired = url in self._expired
            self._expired.discard(url)
        try:
            listing = self._remote.list_files(source)
        except BaseException as error:
            with self._lock:
                if was_expired:
                    self._expired.add(url)
                if isinstance(error, TransientReadError):
                    self._away[_server_of(source)] = self._clock()
                if was_expired or not isinstance(error, TransientReadError) or self._entries.version(url) is None:
                    raise
                self._checked[url] = self._clock()
            _log.warning("%s: served from the disk cache: %s", url, error.message)
            return None
        with self._lock:
            self._checked[url] = self._clock()
            self._away.pop(_server_of(source), None)
        return listing

    def _fetch(self, source: AdapterSource, listing: RemoteListing) -> HeldEntry:
        """Download, within ``fetching``; where the disk is full, a second time after others have gone."""
        if listing.num_bytes > self.byte_limit:
            raise AdapterFileError(
                f"{source.url}: {listing.num_bytes} bytes; the disk cache holds at most {self.byte_limit} "
                "(disk_cache_bytes)",
                key="bytes",
            )
        with self._lock:
            self._misses += 1
        try:
            return self._download(source, listing)
        except OSError as error:
            if not is_full(error):
                raise
        with self._lock:
            self._entries.free(listing.num_bytes)
        return self._download(source, listing)

    def _download(self, source: AdapterSource, listing: RemoteListing) -> HeldEntry:
        record = EntryRecord.of(source.url, listing)
        started = self._clock()
        try:
            with self._lock:
                folder = self._entries.begin(record)
            self._remote.download(source, listing, folder)
            record = replace(record, fetch_seconds=self._clock() - started)
            if not self._folder.seal(record):
                raise TransientReadError(f"{source.url}: what arrived is not what was listed")
            with self._lock:
                self._recent.append(record.fetch_seconds)
                self._note_fetch(source.url, started)
                return self._entries.finish(record)
        except BaseException:
            with self._lock:
                self._entries.abandon(record)
            raise

    def _note_fetch(self, url: str, started: float) -> None:
        self._fetches[url] = started, self._clock()
        self._fetches.move_to_end(url)
        if len(self._fetches) > _MAX_RECENT:
            self._fetches.popitem(last=False)

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(self._root, error) from error


def _server_of(source: AdapterSource) -> tuple[str, str]:
    """What is reached, or is not, as one: a bucket, or the whole hub."""
    return source.scheme, "" if source.scheme == "hf" else source.bucket
