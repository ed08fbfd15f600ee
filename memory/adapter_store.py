"""The host store: adapters read, verified and laid out in page order, within a budget of bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_image import AdapterImage, build_image, plan_layout
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, BaseWeights, RoutingScope

_log = logging.getLogger(__name__)

_MAX_FAILURES = 1000
"""So many failed loads are remembered; the oldest are forgotten first."""

_FILE_TO_IMAGE = 4  # a file of float64 makes an image of a quarter of its size


@dataclass(frozen=True, slots=True)
class Absent:
    """Not here, and nobody is reading it."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Waiting for a loader thread, being read, or waiting for room."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Here. ``seconds`` is what reading, verifying and laying out took, waits for room included.

    ``num_experts`` and ``scope`` are those of the adapter's routing: 0 and None where it has none.
    """

    image: AdapterImage
    warnings: tuple[str, ...]
    rank: int
    targets: tuple[str, ...]
    seconds: float
    num_experts: int = 0
    scope: RoutingScope | None = None

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.image.invocation


@dataclass(frozen=True, slots=True)
class Failed:
    """Could not be read. ``error`` is an AdapterFileError unless the fault is ours; ``at`` is on the store's clock."""

    error: BaseException
    at: float


LoadState = Absent | Loading | Ready | Failed


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot. Counters run since the store was made; a hit is a request for what is here already."""

    images: int
    host_bytes: int
    byte_limit: int
    loading: int
    waiting_for_room: int
    hits: int
    loads: int
    failures: int
    evictions: int


_Key = tuple[str, int]  # path, revision


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of a registration."""

    key: _Key
    state: LoadState = Loading()
    pins: int = 0
    forgotten: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """The room of one image, and the registrations that share it. ``image`` is None while it is being laid out."""

    num_bytes: int
    image: AdapterImage | None = None
    keys: set[_Key] = field(default_factory=set)
    pins: int = 0


class AdapterStore:
    """Reads adapters in loader threads and keeps their images, the least recently used out first.

    ``request``, ``state``, ``pin``, ``unpin`` and ``forget`` are quick and never wait for a file. Two registrations of
    the same content share one image. The budget holds at every moment: a loader whose image finds no room, because what
    is here is pinned, waits until there is some.

    Args:
        shape: what the served base offers to adapters.
        page_elems: elements of a page in one layer.
        dtype: of the served model.
        byte_limit: budget of all images together.
        threads: loader threads, the most files in memory at once.
        allow_bin, base_name, base_weights: as in ``read_adapter``.
        pin_memory: lay images out in page-locked memory, for copies to CUDA.
        on_change: called from a loader thread, without the store's lock, after a load has ended.
        reader, clock: in place of ``read_source`` and the monotonic clock; for tests.
        retry_seconds: how long a failed load is remembered before a request tries again.

    Attributes:
        host_bytes: of all images, those being laid out included.
    """

    def __init__(
        self,
        shape: BaseShape,
        page_elems: int,
        dtype: torch.dtype,
        *,
        byte_limit: int,
        threads: int = 2,
        allow_bin: bool = False,
        pin_memory: bool = False,
        base_name: str | None = None,
        base_weights: BaseWeights | None = None,
        on_change: Callable[[], None] | None = None,
        reader: Callable[[str], AdapterSpec] | None = None,
        clock: Callable[[], float] = time.monotonic,
        retry_seconds: float = 5.0,
    ) -> None:
        self.byte_limit = byte_limit
        self._num_layers = shape.num_layers
        self._page_elems, self._dtype, self._pin_memory = page_elems, dtype, pin_memory
        self._on_change, self._clock, self._retry_seconds = on_change, clock, retry_seconds
        self._reader = reader or partial(
            read_source,
            shape=shape,
            allow_bin=allow_bin,
            max_bytes=_FILE_TO_IMAGE * byte_limit,
            base_name=base_name,
            dtype=dtype,
            base_weights=base_weights,
        )
        self._changed = threading.Condition()
        self._entries: dict[_Key, _Entry] = {}
        self._images: OrderedDict[str, _Held] = OrderedDict()
        self._queue, self._failures = deque[_Entry](), deque[_Entry]()
        self._running: set[_Key] = set()
        self._closed = False
        self.host_bytes = 0
        self._waiting = self._hits = self._loads = self._failed = self._evictions = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def request(self, path: str, revision: int) -> None:
        """Start reading an adapter unless it is here, in flight, or has just failed."""
        key = (path, revision)
        with self._changed:
            entry = self._entries.get(key)
            if entry is not None:
                entry.forgotten = False
                if isinstance(entry.state, Ready):
                    self._hits += 1
                    self._images.move_to_end(entry.state.image.identity)
                if not (isinstance(entry.state, Failed) and self._clock() - entry.state.at >= self._retry_seconds):
                    return
            self._entries[key] = entry = _Entry(key)
            self._queue.append(entry)
            self._changed.notify_all()

    def state(self, path: str, revision: int) -> LoadState:
        """How far an adapter is."""
        with self._changed:
            entry = self._entries.get((path, revision))
            return Absent() if entry is None else entry.state

    def holds(self, identity: str) -> bool:
        """Whether the image of this content is here."""
        with self._changed:
            held = self._images.get(identity)
            return held is not None and held.image is not None

    def pin(self, path: str, revision: int) -> None:
        """Keep an image until as many calls of ``unpin``. KeyError unless its state is Ready."""
        with self._changed:
            entry, held = self._ready((path, revision))
            entry.pins += 1
            held.pins += 1

    def unpin(self, path: str, revision: int) -> None:
        """Undo one ``pin``."""
        with self._changed:
            entry, held = self._ready((path, revision))
            assert entry.pins > 0, "unpinned more often than pinned"
            entry.pins -= 1
            held.pins -= 1
            if entry.pins == 0 and entry.forgotten:
                self._remove(entry)
            self._changed.notify_all()

    def _ready(self, key: _Key) -> tuple[_Entry, _Held]:
        entry = self._entries.get(key)
        if entry is None or not isinstance(entry.state, Ready):
            raise KeyError(f"{key} is not ready")
        return entry, self._images[entry.state.image.identity]

    def forget(self, path: str, revision: int) -> None:
        """Let go of an adapter: now, or at the last ``unpin``. A load in flight is discarded."""
        with self._changed:
            entry = self._entries.get((path, revision))
            if entry is not None and entry.pins:
                entry.forgotten = True
            elif entry is not None:
                self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        if isinstance(entry.state, Ready):
            identity = entry.state.image.identity
            held = self._images[identity]
            held.keys.remove(entry.key)
            if not held.keys:
                self._drop_image(identity)
        self._changed.notify_all()

    def _drop_image(self, identity: str) -> None:
        self.host_bytes -= self._images.pop(identity).num_bytes
        self._changed.notify_all()

    @property
    def stats(self) -> StoreStats:
        with self._changed:
            return StoreStats(
                images=len(self._images),
                host_bytes=self.host_bytes,
                byte_limit=self.byte_limit,
                loading=sum(isinstance(entry.state, Loading) for entry in self._entries.values()),
                waiting_for_room=self._waiting,
                hits=self._hits,
                loads=self._loads,
                failures=self._failed,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Stop the loader threads; files being read are read to their end. States stay as they are."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (entry := self._next_job()) is not None:
            self._run(entry)

    def _next_job(self) -> _Entry | None:
        """Wait for an entry to read, whose key no other thread is reading; None when the store closes."""
        with self._changed:
            while not self._closed:
                self._queue = deque(entry for entry in self._queue if self._is_current(entry))
                entry = next((entry for entry in self._queue if entry.key not in self._running), None)
                if entry is not None:
                    self._queue.remove(entry)
                    self._running.add(entry.key)
                    return entry
                self._changed.wait()
        return None

    def _is_current(self, entry: _Entry) -> bool:
        """Whether nobody has forgotten the entry since."""
        return self._entries.get(entry.key) is entry

    def _run(self, entry: _Entry) -> None:
        """Load one entry and tell; whatever goes wrong becomes its state."""
        try:
            self._load(entry)
        except BaseException as error:
            if not isinstance(error, AdapterFileError):
                _log.exception("reading adapter %r failed", entry.key[0])
            self._fail(entry, error)
        with self._changed:
            self._running.remove(entry.key)
            self._changed.notify_all()
        try:
            if self._on_change is not None:
                self._on_change()
        except Exception:
            _log.exception("on_change failed")

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        # The frames of a traceback hold the file's bytes and tensors.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        with self._changed:
            self._failed += 1
            entry.state = Failed(error, self._clock())
            self._failures.append(entry)
            if len(self._failures) > _MAX_FAILURES and self._is_current(oldest := self._failures.popleft()):
                del self._entries[oldest.key]

    def _load(self, entry: _Entry) -> None:
        started = time.perf_counter()
        spec = self._reader(entry.key[0])
        num_bytes = self._image_bytes(spec)
        with self._changed:
            held = self._find_room(entry, spec.identity, num_bytes)
            if held is None or held.image is not None:
                self._publish(entry, held, spec, started)
                return
        try:
            image = build_image(spec, self._num_layers, self._page_elems, self._dtype, pin_memory=self._pin_memory)
        except BaseException:
            with self._changed:
                self._drop_image(spec.identity)
            raise
        with self._changed:
            held.image = image
            self._publish(entry, held, spec, started)
            if not held.keys:
                self._drop_image(spec.identity)

    def _image_bytes(self, spec: AdapterSpec) -> int:
        pages = plan_layout(spec, self._num_layers, self._dtype).num_pages(self._page_elems)
        num_bytes = self._num_layers * pages * self._page_elems * self._dtype.itemsize
        num_bytes += spec.token_routes.num_bytes if spec.token_routes else 0
        if num_bytes > self.byte_limit:
            raise AdapterFileError(
                f"the adapter takes {num_bytes} bytes in the host store, which may hold {self.byte_limit}", key="bytes"
            )
        return num_bytes

    def _find_room(self, entry: _Entry, identity: str, num_bytes: int) -> _Held | None:
        """The room of an image: that of the same content once it is laid out, or new room, as soon as there is some.

        None when the entry was forgotten or the store closes.
        """
        while self._is_current(entry) and not self._closed:
            held = self._images.get(identity)
            if held is None and self._make_room(num_bytes):
                held = self._images[identity] = _Held(num_bytes)
                self.host_bytes += num_bytes
                return held
            if held is not None and held.image is not None:
                return held
            self._waiting += 1
            self._changed.wait()
            self._waiting -= 1
        return None

    def _make_room(self, num_bytes: int) -> bool:
        """Evict idle images, least recently used first, if that makes room for so many bytes; else evict none."""
        idle = [identity for identity, held in self._images.items() if held.image is not None and not held.pins]
        missing = self.host_bytes + num_bytes - self.byte_limit
        if missing > sum(self._images[identity].num_bytes for identity in idle):
            return False
        while self.host_bytes + num_bytes > self.byte_limit:
            self._evict(idle.pop(0))
        return True

    def _evict(self, identity: str) -> None:
        for key in self._images[identity].keys:
            del self._entries[key]
        self._drop_image(identity)
        self._evictions += 1

    def _publish(self, entry: _Entry, held: _Held | None, spec: AdapterSpec, started: float) -> None:
        if held is None or held.image is None or not self._is_current(entry):
            return
        held.keys.add(entry.key)
        self._images.move_to_end(spec.identity)
        self._loads += 1
        entry.state = Ready(
            held.image,
            spec.warnings,
            spec.rank,
            spec.targets,
            time.perf_counter() - started,
            spec.num_experts,
            spec.routing.scope if spec.routing else None,
        )
        self._changed.notify_all()

    def check_integrity(self) -> None:
        """AssertionError where bytes, pins, registrations and images disagree."""
        with self._changed:
            assert sum(held.num_bytes for held in self._images.values()) == self.host_bytes <= self.byte_limit
            ready = [entry for entry in self._entries.values() if isinstance(entry.state, Ready)]
            assert sum(len(held.keys) for held in self._images.values()) == len(ready)
            assert sum(held.pins for held in self._images.values()) == sum(entry.pins for entry in ready)
            for entry in self._entries.values():
                self._check_entry(entry)

    def _check_entry(self, entry: _Entry) -> None:
        if isinstance(entry.state, Ready):
            held = self._images[entry.state.image.identity]
            assert entry.key in held.keys, "a registration shares an image that does not know it"
            assert held.image is entry.state.image
        else:
            assert entry.pins == 0
        if isinstance(entry.state, Loading):
            assert entry in self._queue or entry.key in self._running or self._closed, "nobody will load this"
