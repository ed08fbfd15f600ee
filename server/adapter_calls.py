"""Calls of the engine's clients about adapters: load, unload, prefetch, pin, restore."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

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
    Message,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    UnloadAdapter,
)
from loraplex.server.prefetch import Prefetcher
from loraplex.server.request import AdapterPages

AdapterCall = LoadAdapter | UnloadAdapter | PrefetchAdapter | PinAdapter | RestoreAdapters
Key = tuple[str, int]
_log = structlog.get_logger(__name__)

_LOOK_AT = 32
"""Open calls that are looked at in one step."""

_MAX_UNLOADED = 10_000


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
        self._open: deque[_Open] = deque()
        self._unloaded: OrderedDict[Key, None] = OrderedDict()
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
        return any(_key(ref) == key for ref in self._retiring)

    def take_moved(self) -> set[Key]:
        """Registrations that were pinned or unpinned since the last call."""
        moved, self._moved = self._moved, set()
        return moved

    def handle(self, command: AdapterCall) -> list[Event]:
        """Take a call in; its answer may be there at once."""
        match command:
            case UnloadAdapter(call_id=call_id, adapter=adapter):
                return [*self._unload(adapter), CallDone(call_id=call_id)]
            case PinAdapter(call_id=call_id, adapter=adapter, pinned=False):
                answers = self._unpin(adapter)
                return [*answers, CallDone(call_id=call_id, adapter=self._directory.info(adapter))]
            case RestoreAdapters(adapters=adapters):
                for one in adapters:
                    self._unloaded.pop(_key(one.adapter), None)
                    if one.identity is not None:
                        self._directory.expect(one.adapter, one.identity)
                    if one.pinned:
                        self._begin(None, PinAdapter(call_id="", adapter=one.adapter))
            case LoadAdapter() | PrefetchAdapter() | PinAdapter():
                self._begin(command.call_id, command)
        return []

    def _begin(self, call_id: str | None, command: LoadAdapter | PrefetchAdapter | PinAdapter) -> None:
        self._unloaded.pop(_key(command.adapter), None)
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
        events: list[Event] = []
        for _ in range(min(len(self._open), _LOOK_AT)):
            call = self._open.popleft()
            try:
                is_done = self._get_on(call)
            except LoraplexError as error:
                if call.call_id is None and isinstance(error, AdapterTooLargeError | ConflictError):
                    _log.warning("a pinned adapter is pinned no more", adapter=call.adapter.name, reason=error.message)
                    self._end(call, CallFailed(call_id="", error=ErrorInfo.of(error)), events)
                elif call.call_id is None:
                    self._open.append(call)  # a pin of before the engine's restart is tried for as long as it is wanted
                else:
                    self._end(call, CallFailed(call_id=call.call_id, error=ErrorInfo.of(error)), events)
                continue
            if is_done:
                info = self._directory.info(call.adapter)
                self._end(call, CallDone(call_id=call.call_id or "", adapter=info), events)
            else:
                self._open.append(call)
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

    def note_request(self, refs: Iterable[AdapterRef]) -> None:
        """A request has come for these; one that has been unloaded meanwhile goes with its last request."""
        for ref in refs:
            if _key(ref) in self._unloaded:
                self._retire(ref)

    def _unload(self, ref: AdapterRef) -> list[Event]:
        """Forget a registration. Its files may be gone or others by now: what its requests began with is kept."""
        answers = self._end_calls(ref)
        self._unloaded[_key(ref)] = None
        if len(self._unloaded) > _MAX_UNLOADED:
            self._unloaded.popitem(last=False)
        if self._num_open_under(ref):
            self._retire(ref)
        else:
            self._forget(ref)
        return answers

    def _retire(self, ref: AdapterRef) -> None:
        if ref not in self._retiring:
            self._retiring.append(ref)
            self._directory.hold(ref)
            self._directory.keep(ref)

    def _forget(self, ref: AdapterRef) -> None:
        identity = self._remove_pin(ref)
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
        self._pinned[_key(ref)] = image.identity
        self._moved.add(_key(ref))

    def _unpin(self, ref: AdapterRef) -> list[Event]:
        """Pin a registration no longer, nor when it has been read."""
        self._remove_pin(ref)
        return self._end_calls(ref, PinAdapter)

    def _remove_pin(self, ref: AdapterRef) -> str | None:
        """Returns the content, if that stays pinned by another registration."""
        identity = self._pinned.pop(_key(ref), None)
        if identity is None:
            return None
        self._moved.add(_key(ref))
        if identity in self._pinned.values():
            return identity
        self._prefetcher.unkeep(identity)
        return None

    def _end_calls(self, ref: AdapterRef, kind: type[Message] = Message) -> list[Event]:
        """End open calls about a registration that is to be what they wanted no more."""
        events: list[Event] = []
        error = ErrorInfo.of(ConflictError(f"Adapter '{ref.name}' was unloaded or unpinned meanwhile."))
        ended = [call for call in self._open if _key(call.adapter) == _key(ref) and isinstance(call.command, kind)]
        for call in ended:
            self._open.remove(call)
            self._end(call, CallFailed(call_id=call.call_id or "", error=error), events)
        return events


def _key(ref: AdapterRef) -> Key:
    return ref.path, ref.revision
