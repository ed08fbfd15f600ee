"""Prefetching by history: what has been wanted often lately comes back into memory that nobody needs at present."""

from __future__ import annotations

import time
from collections.abc import Callable

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_store import Absent, AdapterStore
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.page_pool import PagePool
from loraplex.server.errors import AdapterTooLargeError
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import AdapterRef
from loraplex.server.prefetch import Prefetcher

_EVERY_SECONDS = 1.0
_LOOK_AT = 64
"""So many of the most wanted adapters are looked at."""

_FREE_SHARE = 0.25
"""Of the pool, that is left free for K/V."""


class HistoryPrefetch:
    """Brings one adapter a tier up at a time, without putting anything out.

    Args:
        rates: how often each adapter is wanted, by identity.
        directory, store: the host.
        pool, adapters, prefetcher: the pool.
        clock: monotonic seconds.

    Attributes:
        is_active: whether the last look brought something up: there may be more.
    """

    def __init__(
        self,
        rates: ArrivalRates,
        directory: HostDirectory,
        store: AdapterStore,
        pool: PagePool,
        adapters: AdapterCache,
        prefetcher: Prefetcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rates = rates
        self._directory = directory
        self._store = store
        self._pool = pool
        self._adapters = adapters
        self._prefetcher = prefetcher
        self._clock = clock
        self._next_at = clock()
        self.is_active = False

    def poll(self) -> None:
        """Look for something to bring up, if it is time; call it while nobody waits."""
        if self._clock() < self._next_at:
            return
        self._next_at = self._clock() + _EVERY_SECONDS
        self.is_active = False
        for identity in self._rates.most_wanted(_LOOK_AT):
            assert isinstance(identity, str)
            ref = None if self._adapters.is_resident(identity) else self._directory.ref_of(identity)
            if ref is not None and self._bring_up(identity, ref):
                self.is_active = True
                return

    def _bring_up(self, identity: str, ref: AdapterRef) -> bool:
        content = self._directory.content_of(identity)
        assert content is not None
        if not self._store.holds(identity):
            may_load = isinstance(self._store.state(ref.path, ref.revision), Absent)
            if not may_load or content.num_bytes > self._store.free_bytes:
                return False
            self._store.request(ref.path, ref.revision)
            return True
        if content.num_pages > self._pool.num_free - _FREE_SHARE * self._pool.num_pages:
            return False
        try:
            image = self._directory.pages_of(ref)
        except AdapterTooLargeError:
            return False
        assert image is not None
        self._prefetcher.ask(image)
        return True
