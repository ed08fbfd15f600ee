"""The tiers below the pool as the scheduler sees them, and what the engine tells its clients about adapters."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_store import AdapterStore, Content, Failed, Loading, Ready
from loraplex.memory.merge_recipe import PREFIX
from loraplex.server.adapter_directory import AdapterFailed, AdapterLoading, AdapterReady, AdapterStatus
from loraplex.server.engine_log import adapter_failed, debug
from loraplex.server.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    EngineError,
    LoraplexError,
    UnavailableError,
)
from loraplex.server.messages import AdapterInfo, AdapterRef, AdapterState, AdapterTier, ErrorInfo
from loraplex.server.request import AdapterPages
from loraplex.server.span_times import AdapterLoad, short_identity

_MAX_MERGES = 1000

Key = tuple[str, int]
"""Path and revision of a registration: what the store goes by."""


class HostDirectory:
    """Adapters by registration. An ``AdapterDirectory``.

    Args:
        store: reads adapters and keeps their images.
        resident: which adapters lie in the pool.
        pool_pages: size of the pool.
        num_layers: of the model.
        expire: has a path's remote source asked at its next read whether it has changed.
        last_fetch: when a path's remote source was fetched last, in monotonic seconds.
    """

    def __init__(
        self,
        store: AdapterStore,
        resident: AdapterCache,
        pool_pages: int,
        num_layers: int = 0,
        expire: Callable[[str], None] | None = None,
        last_fetch: Callable[[str], tuple[float, float] | None] | None = None,
    ) -> None:
        self._store = store
        self._expire = expire
        self._last_fetch = last_fetch
        self._loads: dict[Key, tuple[AdapterLoad, ...]] = {}
        self._failed_at: dict[Key, float] = {}
        self._resident = resident
        self._pool_pages = pool_pages
        self._num_layers = num_layers
        self._known: dict[Key, Content] = {}
        self._names: dict[Key, str] = {}
        self._keys_of: dict[str, set[Key]] = {}
        self._retained: dict[Key, str] = {}
        self._merges: OrderedDict[Key, None] = OrderedDict()

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        """How far an adapter is; one that is neither in the pool nor on the host starts to load.

        One that is held stays on the host from now on.
        """
        key = _key(ref)
        known = self._known.get(key)
        if known is not None and (self._resident.is_resident(known.identity) or self._store.held.has_pinned(key)):
            return self._ready(known, self._loads.get(key, ()))
        if is_merged(key):
            self._remember_merge(key)
        self._store.request(ref.path, ref.revision)
        match self._store.state(ref.path, ref.revision):
            case Ready(content=content) as ready:
                if not self._store.secure(*key):
                    return AdapterLoading()
                loads = self._loads_of(ref, ready)
                self._note(ref, content, loads)
                return self._ready(content, loads)
            case Failed(error, at):
                reason = to_loraplex_error(ref, error)
                if self._failed_at.get(key) != at:
                    self._failed_at[key] = at
                    adapter_failed(ref, reason.message)
                return AdapterFailed(reason)
            case _:
                return AdapterLoading()

    def _remember_merge(self, key: Key) -> None:
        """Nobody unloads what was merged for a request: the store forgets those that were asked for longest ago."""
        self._merges[key] = None
        self._merges.move_to_end(key)
        if len(self._merges) > _MAX_MERGES:
            oldest = next((known for known in self._merges if known not in self._store.held), None)
            if oldest is not None:
                del self._merges[oldest]
                self._store.forget(*oldest)
                self._failed_at.pop(oldest, None)

    def _loads_of(self, ref: AdapterRef, ready: Ready) -> tuple[AdapterLoad, ...]:
        """What brought an image to the host: reading it from disk, and fetching it before, if that was part of it."""
        known, num_bytes = self._loads.get(_key(ref)), ready.content.num_bytes
        if known is not None and known[-1].ended == ready.ended:
            return known
        seconds, identity = round(ready.ended - ready.started, 6), short_identity(ready.content.identity)
        debug("an adapter was loaded", adapter=ref.name, adapter_identity=identity, seconds=seconds, bytes=num_bytes)
        fetch = None if self._last_fetch is None else self._last_fetch(ref.path)
        if fetch is None or not ready.started <= fetch[0] <= fetch[1] <= ready.ended:
            return (AdapterLoad("disk", "host", ready.started, ready.ended, num_bytes),)
        return (
            AdapterLoad("remote", "disk", *fetch, num_bytes),
            AdapterLoad("disk", "host", fetch[1], ready.ended, num_bytes),
        )

    def _ready(self, content: Content, loads: tuple[AdapterLoad, ...]) -> AdapterReady:
        return AdapterReady(
            content.identity,
            content.num_pages,
            content.invocation,
            _mix_problem(content),
            content.routes_by_token,
            not self._num_layers or content.first_kv_layer < self._num_layers,
            content.kind,
            content.num_bytes,
            loads,
        )

    def is_at_hand(self, ref: AdapterRef) -> bool:
        """Whether a lookup would find the adapter without loading it."""
        known = self._known.get(_key(ref))
        if known is not None and self._resident.is_resident(known.identity):
            return True
        return isinstance(self._store.state(ref.path, ref.revision), Ready)

    def hold(self, ref: AdapterRef) -> None:
        """Keep an image, from when it is read or a lookup finds it on the host, until ``release_hold``; counted."""
        self._store.hold(*_key(ref))

    def release_hold(self, ref: AdapterRef) -> None:
        """Undo one ``hold``."""
        self._store.release(*_key(ref))

    def keep(self, ref: AdapterRef) -> None:
        """Keep what is there of an adapter that is held, its image on the host or else its pages in the pool, until
        ``forget``, though its files may change. In the pool it gives way to what could not run otherwise."""
        if isinstance(self._store.state(ref.path, ref.revision), Ready) and self._store.secure(*_key(ref)):
            return
        key = _key(ref)
        known = self._known.get(key)
        if known is not None:
            self._resident.keep(known.identity, by=repr(key))
            self._retained[key] = known.identity

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        """Whether one of these adapters waits for room while nothing but these is pinned in the store."""
        keys = {_key(ref) for ref in refs}
        return keys.issuperset(self._store.held.pinned) and self._store.waits_for_room(keys)

    def image(self, ref: AdapterRef) -> AdapterImage:
        """The image of an adapter that is held and was found on the host."""
        state = self._store.state(ref.path, ref.revision)
        assert isinstance(state, Ready), f"the image of adapter {ref.name} is not on the host"
        return state.image

    def pages_of(self, ref: AdapterRef) -> AdapterPages | None:
        """What an adapter takes in the pool; None if it has never been read.

        Raises:
            AdapterTooLargeError: the pool could never hold it.
        """
        known = self._known.get(_key(ref))
        if known is None:
            return None
        if known.num_pages > self._pool_pages:
            raise AdapterTooLargeError(
                f"Adapter '{ref.name}' needs {known.num_pages} pages, but the pool has {self._pool_pages}.",
                param="lora_path",
            )
        return AdapterPages(known.identity, ref, known.num_pages)

    def refresh(self, ref: AdapterRef) -> None:
        """The first read of a registration is to see what its source holds now, not what was fetched before, nor the
        error that it met a moment ago."""
        self._store.retry(*_key(ref))
        if self._expire is not None and _key(ref) not in self._known:
            with contextlib.suppress(AdapterFileError):  # the read will say the same
                self._expire(ref.path)

    def expect(self, ref: AdapterRef, identity: str) -> None:
        """Whatever is read for a registration must have this content; what was known of another one is void."""
        known = self._known.get(_key(ref))
        if known is not None and known.identity != identity:
            self._unknow(_key(ref))
        self._store.expect(*_key(ref), identity)

    def forget(self, ref: AdapterRef) -> None:
        """Let go of a registration; what runs under it goes on."""
        key = _key(ref)
        self._store.forget(*key)
        self._failed_at.pop(key, None)
        retained = self._retained.pop(key, None)
        if retained is not None:
            self._resident.unkeep(retained, by=repr(key))
        self._unknow(key)

    def _unknow(self, key: Key) -> None:
        """Forget what a registration stands for; a content that nothing stands for any more leaves the pool."""
        self._names.pop(key, None)
        self._loads.pop(key, None)
        gone = self._known.pop(key, None)
        if gone is None:
            return
        keys = self._keys_of[gone.identity]
        keys.remove(key)
        if not keys:
            del self._keys_of[gone.identity]
            self._resident.drop(gone.identity)

    def info(self, ref: AdapterRef) -> AdapterInfo | None:
        """What is known of an adapter; None if it has never been read."""
        known = self._known.get(_key(ref))
        return None if known is None else _info(known)

    def content_of(self, identity: str) -> Content | None:
        """What is known of a content that something is registered under."""
        keys = self._keys_of.get(identity)
        return None if keys is None else self._known[next(iter(keys))]

    def ref_of(self, identity: str) -> AdapterRef | None:
        """A registration of this content, if there is one."""
        keys = self._keys_of.get(identity)
        if keys is None:
            return None
        path, revision = next(iter(keys))
        return AdapterRef(name=self._names[path, revision], path=path, revision=revision)

    def keys_of(self, identity: str) -> Collection[Key]:
        """The registrations of this content."""
        return self._keys_of.get(identity, ())

    def state(self, key: Key, *, pinned: bool) -> AdapterState:
        """What clients are told of a registration."""
        state, known = self._store.state(*key), self._known.get(key) or self._store.content(*key)
        error = None
        if isinstance(state, Failed):
            ref = AdapterRef(name=self._names.get(key, key[0]), path=key[0], revision=key[1])
            error = ErrorInfo.of(to_loraplex_error(ref, state.error))
        return AdapterState(
            path=key[0],
            revision=key[1],
            tier="disk" if known is None else self.tier(known.identity),
            loading=isinstance(state, Loading),
            pinned=pinned,
            info=None if known is None else _info(known),
            error=error,
        )

    def tier(self, identity: str) -> AdapterTier:
        """The uppermost tier that holds a content."""
        if self._resident.is_resident(identity):
            return "pool"
        return "host" if self._store.holds(identity) else "disk"

    def by_name(self, counts: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The same by the adapters' names instead of their identities; those that are not registered are left out."""
        refs = {identity: self.ref_of(identity) for identity in counts}
        return {ref.name: counts[identity] for identity, ref in refs.items() if ref is not None}

    def _note(self, ref: AdapterRef, content: Content, loads: tuple[AdapterLoad, ...]) -> None:
        key = _key(ref)
        if not is_merged(key):
            self._loads[key] = loads
        # Adapters merged for a request have no name that could be listed, and there is no end to them.
        if key not in self._known and not is_merged(key):
            self._known[key] = content
            self._names[key] = ref.name
            self._keys_of.setdefault(content.identity, set()).add(key)


def is_merged(key: Key) -> bool:
    """Whether a key is of a merged adapter, which nobody has registered."""
    return key[0].startswith(PREFIX)


def _key(ref: AdapterRef) -> Key:
    return ref.path, ref.revision


def _info(content: Content) -> AdapterInfo:
    return AdapterInfo(
        identity=content.identity,
        kind=content.kind,
        rank=content.rank,
        targets=list(content.targets),
        bytes=content.num_bytes,
        pages=content.num_pages,
        num_experts=content.num_experts,
        warnings=list(content.warnings),
    )


def _mix_problem(content: Content) -> str | None:
    """Why an adapter cannot be added up with others."""
    if content.scope == "ffn":
        return "has experts that are whole feed-forward networks, which cannot be part of a mix"
    return "is an activated LoRA, which cannot be part of a mix" if content.invocation else None


def to_loraplex_error(ref: AdapterRef, error: BaseException) -> LoraplexError:
    """What clients hear of a failed load."""
    if isinstance(error, TransientReadError):
        return UnavailableError(f"Adapter '{ref.name}': {error.message}", param=error.key, code="adapter_unavailable")
    if not isinstance(error, AdapterFileError):
        return EngineError(f"Adapter '{ref.name}' could not be read: {type(error).__name__}.")
    kind = AdapterTooLargeError if error.key == "bytes" else AdapterInvalidError
    return kind(f"Adapter '{ref.name}': {error.message}", param=error.key)
