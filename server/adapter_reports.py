"""What changes with adapters, gathered for the engine's clients: states by registration, and use by tier and kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.disk_cache import DiskCacheStats
from loraplex.memory.store_states import StoreStats
from loraplex.server.adapter_calls import AdapterCalls
from loraplex.server.engine_log import debug, is_debugging
from loraplex.server.host_directory import HostDirectory, Key, is_merged
from loraplex.server.messages import AdapterState, AdapterStates, TierUse
from loraplex.server.span_times import short_identity


class AdapterReports:
    """Follows the tiers by what they say has changed, so that a report costs as much as there is to tell.

    Args:
        directory, store, adapters: the tiers.
        calls: by which adapters are pinned.
        page_bytes: of a page over all layers.
    """

    def __init__(
        self,
        directory: HostDirectory,
        store: AdapterStore,
        adapters: AdapterCache,
        calls: AdapterCalls,
        page_bytes: int,
    ) -> None:
        self._directory = directory
        self._store = store
        self._adapters = adapters
        self._calls = calls
        self._page_bytes = page_bytes
        self._moved: set[Key] = set()
        self._in_pool: dict[str, tuple[str, int]] = {}
        self._adapters_of: Counter[str] = Counter()
        self._pages_of: Counter[str] = Counter()

    def follow(self) -> set[str]:
        """Take in what has changed. Adapters whose copies on the host came or went are worth less or more now.

        Returns:
            Identities of adapters that have left the pool since the last call.
        """
        left: set[str] = set()
        self._moved |= self._store.take_changes() | self._calls.take_moved()
        for identity in self._store.take_moves():
            self._adapters.rescore(identity)
            self._moved.update(self._directory.keys_of(identity))
            if not self._store.holds(identity):
                self._log_gone(identity, "host")
        for identity in self._adapters.take_changes():
            self._moved.update(self._directory.keys_of(identity))
            self._recount(identity)
            if not self._adapters.is_resident(identity):
                left.add(identity)
                self._log_gone(identity, "pool")
        return left

    def _log_gone(self, identity: str, tier: str) -> None:
        if is_debugging():
            ref = self._directory.ref_of(identity)
            name = None if ref is None else ref.name
            debug("an adapter left a tier", tier=tier, adapter=name, adapter_identity=short_identity(identity))

    def _recount(self, identity: str) -> None:
        before = self._in_pool.pop(identity, None)
        if before is not None:
            kind, pages = before
            self._adapters_of[kind] -= 1
            self._pages_of[kind] -= pages
        if self._adapters.is_resident(identity):
            content = self._directory.content_of(identity)
            kind = "merged" if content is None else content.kind
            pages = len(self._adapters.pages(identity))
            self._in_pool[identity] = kind, pages
            self._adapters_of[kind] += 1
            self._pages_of[kind] += pages

    def take(self) -> AdapterStates | None:
        """The states that have changed since the last call, as far as ``follow`` has taken it in."""
        if not self._moved:
            return None
        moved, self._moved = self._moved, set()
        states = [
            self._directory.state(key, pinned=self._calls.is_pinned(key))
            for key in sorted(moved)
            if not is_merged(key) and not self._calls.is_retiring(key)
        ]
        # Of a registration that has been forgotten there is nothing to tell.
        told = [state for state in states if state != AdapterState(path=state.path, revision=state.revision)]
        return AdapterStates(states=told) if told else None

    def uses(self, store: StoreStats, disk: DiskCacheStats | None) -> Iterator[TierUse]:
        """What adapters take now, by tier and kind; kinds that were in the pool once are told as 0."""
        for kind, count in sorted(self._adapters_of.items()):
            pages = self._pages_of[kind]
            yield TierUse("pool", kind, count, pages * self._page_bytes, pages)
        for kind, use in sorted(store.by_kind.items()):
            yield TierUse("host", kind, use.adapters, use.num_bytes)
        if disk is not None:
            yield TierUse("disk", "", disk.entries, disk.num_bytes)
