"""The host store of adapters as the scheduler sees it, and what the engine tells its clients about adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_store import AdapterStore, Failed, Ready
from loraplex.memory.merge_recipe import PREFIX
from loraplex.server.adapter_directory import AdapterFailed, AdapterLoading, AdapterReady, AdapterStatus
from loraplex.server.errors import AdapterInvalidError, AdapterTooLargeError, EngineError, LoraplexError
from loraplex.server.messages import AdapterInfo, AdapterRef, AdapterTier

Key = tuple[str, int]
"""Path and revision of a registration: what the store goes by."""


class HostDirectory:
    """Adapters on the host, by registration. An ``AdapterDirectory``.

    Args:
        store: reads adapters and keeps their images.
        resident: which adapters lie in the pool.
        pool_pages: size of the pool.
    """

    def __init__(self, store: AdapterStore, resident: AdapterCache, pool_pages: int) -> None:
        self._store = store
        self._resident = resident
        self._pool_pages = pool_pages
        self._holds: Counter[Key] = Counter()
        self._pinned: set[Key] = set()
        self._known: dict[Key, AdapterInfo] = {}

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        """How far an adapter is; an absent one starts to load. One that is held is pinned as soon as it is there."""
        self._store.request(ref.path, ref.revision)
        match self._store.state(ref.path, ref.revision):
            case Ready() as ready:
                if not self._pin_held(ref):
                    return AdapterLoading()
                self._note(ref, ready)
                image = ready.image
                return AdapterReady(
                    image.identity,
                    image.num_pages,
                    image.invocation,
                    _mix_problem(ready),
                    image.token_routes is not None,
                )
            case Failed(error):
                return AdapterFailed(to_loraplex_error(ref, error))
            case _:
                return AdapterLoading()

    def _pin_held(self, ref: AdapterRef) -> bool:
        """Pin in the store what is held here; False where it has been evicted a moment ago."""
        key = _key(ref)
        if self._holds[key] and key not in self._pinned:
            try:
                self._store.pin(*key)
            except KeyError:
                return False
            self._pinned.add(key)
        return True

    def hold(self, ref: AdapterRef) -> None:
        """Keep an image from when it is there until ``release_hold``; counted."""
        self._holds[_key(ref)] += 1

    def release_hold(self, ref: AdapterRef) -> None:
        """Undo one ``hold``."""
        key = _key(ref)
        self._holds[key] -= 1
        if self._holds[key] == 0:
            del self._holds[key]
            if key in self._pinned:
                self._pinned.remove(key)
                self._store.unpin(*key)

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        """Whether a load waits for room while nothing but these adapters is pinned in the store."""
        return self._pinned <= {_key(ref) for ref in refs} and self._store.stats.waiting_for_room > 0

    def image(self, ref: AdapterRef) -> AdapterImage:
        """The image of an adapter that is held and was found ready."""
        state = self._store.state(ref.path, ref.revision)
        assert isinstance(state, Ready), f"the image of adapter {ref.name} is not on the host"
        return state.image

    def check_size(self, ref: AdapterRef, num_pages: int) -> None:
        """AdapterTooLargeError for an adapter that the pool could never hold."""
        if num_pages > self._pool_pages:
            raise AdapterTooLargeError(
                f"Adapter '{ref.name}' needs {num_pages} pages, but the pool has {self._pool_pages}.",
                param="lora_path",
            )

    def forget(self, ref: AdapterRef) -> None:
        """Let go of a registration; what runs under it goes on."""
        key = _key(ref)
        self._store.forget(*key)
        gone = self._known.pop(key, None)
        if gone is not None and all(info.identity != gone.identity for info in self._known.values()):
            self._resident.drop(gone.identity)

    def info(self, ref: AdapterRef) -> AdapterInfo | None:
        """What is known of an adapter; None if it has never been read."""
        known = self._known.get(_key(ref))
        return None if known is None else msgspec.structs.replace(known, name=ref.name, tier=self._tier(known))

    def infos(self, running: Mapping[AdapterRef, int]) -> list[AdapterInfo]:
        """All that has been read and not forgotten; ``running`` counts sequences by registration."""
        counts = {_key(ref): count for ref, count in running.items()}
        return [
            msgspec.structs.replace(info, tier=self._tier(info), running=counts.get(key, 0))
            for key, info in self._known.items()
        ]

    def by_name(self, counts: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The same by the adapters' names instead of their identities; those that are not listed are left out."""
        if not counts:
            return {}
        names = {info.identity: info.name for info in self._known.values()}
        return {names[identity]: values for identity, values in counts.items() if identity in names}

    def _note(self, ref: AdapterRef, ready: Ready) -> None:
        image = ready.image
        known = self._known.get(_key(ref))
        # Adapters merged for a request have no name that could be listed, and there is no end to them.
        if (known is not None and known.identity == image.identity) or ref.path.startswith(PREFIX):
            return
        self._known[_key(ref)] = AdapterInfo(
            name=ref.name,
            path=ref.path,
            identity=image.identity,
            kind=image.kind,
            rank=ready.rank,
            targets=list(ready.targets),
            bytes=image.num_bytes,
            pages=image.num_pages,
            tier="host",
            num_experts=ready.num_experts,
            warnings=list(ready.warnings),
        )

    def _tier(self, info: AdapterInfo) -> AdapterTier:
        if self._resident.is_resident(info.identity):
            return "pool"
        return "host" if self._store.holds(info.identity) else "disk"


def _key(ref: AdapterRef) -> Key:
    return ref.path, ref.revision


def _mix_problem(ready: Ready) -> str | None:
    """Why an adapter cannot be added up with others."""
    if ready.scope == "ffn":
        return "has experts that are whole feed-forward networks, which cannot be part of a mix"
    return "is an activated LoRA, which cannot be part of a mix" if ready.image.invocation else None


def to_loraplex_error(ref: AdapterRef, error: BaseException) -> LoraplexError:
    """What clients hear of a failed load."""
    if not isinstance(error, AdapterFileError):
        return EngineError(f"Adapter '{ref.name}' could not be read: {type(error).__name__}.")
    kind = AdapterTooLargeError if error.key == "bytes" else AdapterInvalidError
    return kind(f"Adapter '{ref.name}': {error.message}", param=error.key)
