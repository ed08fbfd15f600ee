"""Calls of the engine's clients about adapters: load, unload, prefetch, pin, restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraplex.server.adapter_directory import AdapterFailed, AdapterReady
from loraplex.server.errors import AdapterTooLargeError, ConflictError, LoraplexError
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import (
    AdapterRef,
    CallDone,
    CallFailed,
    ErrorInfo,
    Event,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    UnloadAdapter,
)
from loraplex.server.prefetch import Prefetcher
from loraplex.server.request import AdapterPages

AdapterCall = LoadAdapter | UnloadAdapter | PrefetchAdapter | PinAdapter | RestoreAdapters
Key = tuple[str, int]


@dataclass(slots=True)
class _Open:
    """A call that waits for its adapter: to be read first, then, for a prefetch into the pool, to arrive.

    ``call_id`` is None where nobody waits for an answer.
    """

    call_id: str | None
    command: LoadAdapter | PrefetchAdapter | PinAdapter
    identity: str | None = None

    @property
    def adapter(self) -> AdapterRef:
        return self.command.adapter


class AdapterCalls:
    """Takes calls in and answers them when what they ask for is done, or cannot be.

    Args:
        directory: of adapters.
        prefetcher: brings adapters into the pool.
        max_pinned_pages: pages that pinned adapters may take together.
        num_open_under: counts the open requests under a registration.
    """

    def __init__(
        self,
        directory: HostDirectory,
        prefetcher: Prefetcher,
        max_pinned_pages: int,
        num_open_under: Callable[[AdapterRef], int],
    ) -> None:
        self._directory = directory
        self._prefetcher = prefetcher
        self._num_open_under = num_open_under
        self._retiring: list[AdapterRef] = []
        self._max_pinned_pages = max_pinned_pages
        self._open: list[_Open] = []
        self._pinned: dict[Key, str] = {}
        self._moved: set[Key] = set()

    @property
    def has_work(self) -> bool:
        """Whether a call is open, or an adapter stays for the requests that began with it."""
        return bool(self._open or self._retiring)

    def is_pinned(self, key: Key) -> bool:
        """Whether a registration is pinned."""
        return key in self._pinned

    def is_retiring(self, key: Key) -> bool:
        """Whether a registration has been unloaded and stays for its requests alone: nobody is to be told of it."""
        return any((ref.path, ref.revision) == key for ref in self._retiring)

    def take_moved(self) -> set[Key]:
        """Registrations that were pinned or unpinned since the last call."""
        moved, self._moved = self._moved, set()
        return moved

    def handle(self, command: AdapterCall) -> list[Event]:
        """Take a call in; its answer may be there at once."""
        match command:
            case UnloadAdapter(call_id=call_id, adapter=adapter):
                self._unload(adapter)
                return [CallDone(call_id=call_id)]
            case PinAdapter(call_id=call_id, adapter=adapter, pinned=False):
                self._unpin(adapter)
                return [CallDone(call_id=call_id, adapter=self._directory.info(adapter))]
            case RestoreAdapters(adapters=adapters):
                for one in adapters:
                    if one.identity is not None:
                        self._directory.expect(one.adapter, one.identity)
                    if one.pinned:
                        self._begin(None, PinAdapter(call_id="", adapter=one.adapter))
            case LoadAdapter() | PrefetchAdapter() | PinAdapter():
                self._begin(command.call_id, command)
        return []

    def _begin(self, call_id: str | None, command: LoadAdapter | PrefetchAdapter | PinAdapter) -> None:
        if isinstance(command, LoadAdapter):
            self._directory.refresh(command.adapter)
        self._directory.hold(command.adapter)
        self._open.append(_Open(call_id, command))

    def poll(self) -> list[Event]:
        """Answers to calls that have come to an end."""
        for ref in [ref for ref in self._retiring if not self._num_open_under(ref)]:
            self._retiring.remove(ref)
            self._directory.release_hold(ref)
            self._forget(ref)
        if not self._open:
            return []
        events: list[Event] = []
        still: list[_Open] = []
        for call in self._open:
            try:
                is_done = self._get_on(call)
            except LoraplexError as error:
                self._end(call, CallFailed(call_id=call.call_id or "", error=ErrorInfo.of(error)), events)
                if isinstance(call.command, LoadAdapter):
                    self._directory.forget(call.adapter)
                continue
            if is_done:
                info = self._directory.info(call.adapter)
                self._end(call, CallDone(call_id=call.call_id or "", adapter=info), events)
            else:
                still.append(call)
        self._open = still
        return events

    def _end(self, call: _Open, answer: Event, events: list[Event]) -> None:
        self._directory.release_hold(call.adapter)
        if call.call_id is not None:
            events.append(answer)

    def _get_on(self, call: _Open) -> bool:
        """Whether a call is done. LoraplexError where it never will be."""
        if call.identity is not None:
            return not self._prefetcher.is_asked(call.identity)
        match self._directory.lookup(call.adapter):
            case AdapterFailed(error):
                raise error
            case AdapterReady():
                image = self._directory.pages_of(call.adapter)
                assert image is not None
                return self._has_been_read(call, image)
        return False

    def _has_been_read(self, call: _Open, image: AdapterPages) -> bool:
        command = call.command
        if isinstance(command, PinAdapter):
            self._pin(command.adapter, image)
        elif isinstance(command, PrefetchAdapter) and command.tier == "pool":
            self._prefetcher.ask(image)
            call.identity = image.identity
            return not self._prefetcher.is_asked(image.identity)
        return True

    def _unload(self, ref: AdapterRef) -> None:
        """Forget a registration. Its files may be gone or others by now: what its requests began with is kept."""
        if not self._num_open_under(ref):
            self._forget(ref)
        elif ref not in self._retiring:
            self._retiring.append(ref)
            self._directory.hold(ref)
            self._directory.keep(ref)

    def _forget(self, ref: AdapterRef) -> None:
        identity = self._unpin(ref)
        self._directory.forget(ref)
        if identity is not None and (other := self._directory.ref_of(identity)) is not None:
            self._prefetcher.move(identity, other)

    def _pin(self, ref: AdapterRef, image: AdapterPages) -> None:
        if not self._prefetcher.is_kept(image.identity):
            total = self._prefetcher.kept_pages + image.num_pages
            if image.num_pages > self._max_pinned_pages:
                raise AdapterTooLargeError(
                    f"Adapter '{ref.name}' needs {image.num_pages} pages; pinned adapters may take "
                    f"{self._max_pinned_pages} pages together (max_pinned_fraction).",
                    param="pinned",
                )
            if total > self._max_pinned_pages:
                raise ConflictError(
                    f"With adapter '{ref.name}' the pinned adapters would take {total} pages; they may take "
                    f"{self._max_pinned_pages} together (max_pinned_fraction). Unpin another one first.",
                    param="pinned",
                )
            self._prefetcher.keep(image)
        self._pinned[ref.path, ref.revision] = image.identity
        self._moved.add((ref.path, ref.revision))

    def _unpin(self, ref: AdapterRef) -> str | None:
        """Pin a registration no longer. Returns its content, if that stays pinned by another one."""
        key = (ref.path, ref.revision)
        self._open = [call for call in self._open if not self._is_void(call, key)]
        identity = self._pinned.pop(key, None)
        if identity is None:
            return None
        self._moved.add(key)
        if identity in self._pinned.values():
            return identity
        self._prefetcher.unkeep(identity)
        return None

    def _is_void(self, call: _Open, key: Key) -> bool:
        """Whether a call is a pin without anybody who waits, of a registration that is to be pinned no more."""
        is_void = (
            call.call_id is None
            and isinstance(call.command, PinAdapter)
            and (call.adapter.path, call.adapter.revision) == key
        )
        if is_void:
            self._directory.release_hold(call.adapter)
        return is_void
