"""The host store: adapters read, verified and laid out in page order, within a budget of bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import torch

from loraplex.memory.adapter_errors import AdapterChangedError
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape
from loraplex.memory.arrival_rates import NEVER, ArrivalRates, worth_of
from loraplex.memory.eviction_order import EvictionOrder, LruOrder
from loraplex.memory.host_slab import HostSlab
from loraplex.memory.store_books import check_books
from loraplex.memory.store_holds import Holds
from loraplex.memory.store_images import HeldImage, HostImages
from loraplex.memory.store_read_times import ReadTimes
from loraplex.memory.store_reading import AdapterReading, ReadAdapter
from loraplex.memory.store_records import Record, Records
from loraplex.memory.store_retries import BackOff
from loraplex.memory.store_states import (
    Absent,
    Content,
    Failed,
    Key,
    Loading,
    LoadState,
    Ready,
    StoreStats,
)
from loraplex.memory.store_threads import LoaderThreads

__all__ = ["Absent", "AdapterStore", "Content", "Failed", "LoadState", "Loading", "Ready", "StoreStats"]

_PATIENCE = 0.05
"""Seconds that a load waits for the memory of images that have gone but are still being read, before others go."""


class AdapterStore:
    """Reads adapters in loader threads and keeps their images, the least valuable out first.

    No call waits for a file, and none but ``check_integrity`` takes longer the more adapters there are. Two
    registrations of the same content share one image. The budget holds at every moment: a loader whose image finds no
    room, because what is here is pinned, waits until there is some.

    A registration keeps the content that was read under it first (see ``expect``). A load that fails is an error of
    that registration alone; it is tried again on request, but not before a pause that doubles with each failure.

    Args:
        shape: what the served base offers to adapters.
        page_elems: elements of a page in one layer.
        dtype: of the served model.
        byte_limit: budget of all images together. Memory is reserved at once and taken as it is used.
        threads: loader threads, the most files in memory at once.
        pin_memory: lay images out in page-locked memory, for copies to CUDA; all of it is taken at once.
        on_change: called from a loader thread, without the store's lock, after a load has ended.
        reader: reads a path (see ``bounded_reader``).
        clock: monotonic seconds.
        rates: how often contents are wanted; what is rarely wanted, quickly read and large is worth least.
        order: of eviction; by default the least recently used goes first.
        first_retry_seconds, longest_retry_seconds: pause after the first failure of a load, and the longest.
        sleep: waits between tries within a load; by default until the store closes at the latest.

    Attributes:
        held: who holds what; any thread may ask, and nobody but the store may tell it.
    """

    def __init__(
        self,
        shape: BaseShape,
        page_elems: int,
        dtype: torch.dtype,
        *,
        byte_limit: int,
        reader: Callable[[str], AdapterSpec],
        threads: int = 2,
        pin_memory: bool = False,
        on_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        rates: ArrivalRates | None = None,
        order: EvictionOrder | None = None,
        first_retry_seconds: float = 1.0,
        longest_retry_seconds: float = 60.0,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.byte_limit = byte_limit
        self._num_layers = shape.num_layers
        self._clock, self._rates = clock, rates
        self._back_off = BackOff(first_retry_seconds, longest_retry_seconds)
        self._changed = threading.Condition()
        self._slab = HostSlab(byte_limit, page_elems, dtype, page_locked=pin_memory, on_return=self._wake)
        self._images = HostImages(self._slab, byte_limit, order or LruOrder(), self._worth, self._note_gone)
        self._times = ReadTimes()
        self._records = Records()
        self._moves: set[str] = set()
        self._cramped: set[Key] = set()
        self.held = Holds()
        self._hits = self._misses = self._loads = self._failures = 0
        self._threads = LoaderThreads(threads, self._changed, self._load, self._fail, on_change)
        self._queue = self._threads.queue
        self._reading = AdapterReading(
            reader,
            num_layers=shape.num_layers,
            page_elems=page_elems,
            dtype=dtype,
            block_bytes=self._slab.block_bytes,
            byte_limit=byte_limit,
            sleep=sleep or self._threads.closing.wait,
        )
        self._threads.start()

    def request(self, path: str, revision: int) -> None:
        """Start reading an adapter unless it is here, in flight, or has failed a moment ago."""
        with self._changed:
            record = self._records.obtain((path, revision))
            record.forgotten = False
            match record.state:
                case Ready(image):
                    self._hits += 1
                    self._images.touch(self._held(image.identity))
                case Absent():
                    self._start(record)
                case Failed() as failed if self._clock() >= failed.retry_at:
                    self._start(record)
                case _:
                    pass

    def retry(self, path: str, revision: int) -> None:
        """Try a load that has failed again at once."""
        with self._changed:
            record = self._records.find((path, revision))
            if record is not None and isinstance(record.state, Failed):
                self._start(record)

    def _start(self, record: Record) -> None:
        self._misses += 1
        self._records.set_state(record, Loading())
        self._queue.add(record.key, record)
        self._changed.notify_all()

    def expect(self, path: str, revision: int, identity: str) -> None:
        """From now on a read of this registration must yield this content, or it fails with ``AdapterChangedError``.

        The first read sets that by itself. Other content that is here goes, now or at its last ``unpin``.
        """
        with self._changed:
            record = self._records.obtain((path, revision))
            record.expected = identity
            if isinstance(record.state, Ready) and not record.pins:
                self._release(record)

    def expected(self, path: str, revision: int) -> str | None:
        """The content that a read of this registration must yield; None where any will do."""
        with self._changed:
            record = self._records.find((path, revision))
            return None if record is None else record.expected

    def state(self, path: str, revision: int) -> LoadState:
        """How far an adapter is."""
        with self._changed:
            record = self._records.find((path, revision))
            return Absent() if record is None else record.state

    def content(self, path: str, revision: int) -> Content | None:
        """What an adapter is, from its last read on until it is forgotten, whether it is here or not."""
        with self._changed:
            record = self._records.find((path, revision))
            return None if record is None else record.content

    def holds(self, identity: str) -> bool:
        """Whether the image of this content is here."""
        with self._changed:
            held = self._images.find(identity)
            return held is not None and held.image is not None

    def seconds_to_read(self, identity: str, num_bytes: int | None = None) -> float:
        """What reading this content took last; else what an image of so many bytes, or of any size, took of late."""
        with self._changed:
            return self._times.seconds_of(identity, num_bytes)

    def pin(self, path: str, revision: int) -> None:
        """Keep an image until as many calls of ``unpin``. KeyError unless its state is Ready."""
        with self._changed:
            record, held = self._ready((path, revision))
            record.pins += 1
            self._images.pin(held)

    def unpin(self, path: str, revision: int) -> None:
        """Undo one ``pin``."""
        with self._changed:
            record, held = self._ready((path, revision))
            assert record.pins > 0, "unpinned more often than pinned"
            record.pins -= 1
            self._images.unpin(held)
            if record.pins == 0:
                self._release(record)
            self._changed.notify_all()

    def hold(self, path: str, revision: int) -> None:
        """Whatever is read for a registration from now on stays until ``release``; counted.

        What is here already stays from ``secure`` on.
        """
        with self._changed:
            self.held.add((path, revision))

    def secure(self, path: str, revision: int) -> bool:
        """Have what is held stay; False if it is not here. True, without effect, where nobody holds it."""
        key = (path, revision)
        with self._changed:
            record = self._records.find(key)
            if record is not None:
                self._pin_held(record)
            return key not in self.held or self.held.has_pinned(key)

    def release(self, path: str, revision: int) -> None:
        """Undo one ``hold``."""
        with self._changed:
            if self.held.discard((path, revision)):
                self.unpin(path, revision)

    def _pin_held(self, record: Record) -> None:
        if isinstance(record.state, Ready) and self.held.begin(record.key):
            record.pins += 1
            self._images.pin(self._held(record.state.image.identity))

    def _release(self, record: Record) -> None:
        """Let go of an unpinned image that is not wanted any more."""
        if record.forgotten:
            self._remove(record)
        elif isinstance(record.state, Ready) and record.state.image.identity != record.expected:
            held = self._held(record.state.image.identity)
            self._records.set_state(record, Absent())
            self._images.leave(held, record.key, "changed")

    def forget(self, path: str, revision: int) -> None:
        """Let go of an adapter and of what is known of it, now or at the last ``unpin``. Its load is discarded."""
        with self._changed:
            record = self._records.find((path, revision))
            if record is None:
                return
            record.forgotten = True
            if not record.pins:
                self._remove(record)

    def _remove(self, record: Record) -> None:
        state, record.state = record.state, Absent()  # a thread that just has loaded it still knows the record
        self._records.remove(record)
        self._queue.discard(record.key)
        if isinstance(state, Ready):
            self._images.leave(self._held(state.image.identity), record.key, "forgotten")
        self._changed.notify_all()

    def waits_for_room(self, keys: Iterable[Key]) -> bool:
        """Whether one of these has been read and finds no room."""
        with self._changed:
            return not self._cramped.isdisjoint(keys)

    def take_changes(self) -> set[Key]:
        """Registrations whose state has changed since the last call, those forgotten left out."""
        with self._changed:
            return self._records.take_changes()

    def take_moves(self) -> set[str]:
        """Contents whose image has come or gone since the last call."""
        with self._changed:
            moves, self._moves = self._moves, set()
        return moves

    def take_recent(self) -> list[float]:
        """The seconds of each load that succeeded since the last call."""
        with self._changed:
            return self._times.take_recent()

    @property
    def host_bytes(self) -> int:
        """Of all images, also those being laid out, and those that have left but are still being read."""
        with self._changed:
            return self._images.num_bytes

    @property
    def free_bytes(self) -> int:
        """That could be taken without any image going."""
        with self._changed:
            return self._images.free_bytes

    @property
    def stats(self) -> StoreStats:
        with self._changed:
            return StoreStats(
                images=len(self._images),
                host_bytes=self._images.num_bytes,
                byte_limit=self.byte_limit,
                loading=len(self._queue) + sum(self._records.is_current(record) for record in self._queue.running),
                waiting_for_room=len(self._cramped),
                hits=self._hits,
                misses=self._misses,
                loads=self._loads,
                failures=self._failures,
                evictions_by_reason=dict(self._images.evictions),
                by_kind=self._images.by_kind,
            )

    def close(self) -> None:
        """Stop the loader threads; files being read are read to their end. States stay as they are.

        No copy from an image to a GPU may be under way.
        """
        self._threads.close()
        self._slab.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _ready(self, key: Key) -> tuple[Record, HeldImage]:
        record = self._records.find(key)
        if record is None or not isinstance(record.state, Ready):
            raise KeyError(f"{key} is not ready")
        return record, self._held(record.state.image.identity)

    def _held(self, identity: str) -> HeldImage:
        held = self._images.find(identity)
        assert held is not None, f"{identity} is not here"
        return held

    def _worth(self, content: Content) -> float:
        if self._rates is None:
            return 0.0
        seconds = self._times.seconds_of(content.identity, content.num_bytes)
        weight = self._rates.log_weight(content.identity)
        if weight == NEVER:  # somebody had it read, whom nobody could count as long as its identity was not known
            weight = self._rates.one_more(weight)
        return worth_of(seconds, weight, content.num_bytes)

    def _note_gone(self, held: HeldImage, reason: str) -> None:
        del reason
        self._moves.add(held.content.identity)
        for key in held.keys:
            self._records.set_state(self._records.obtain(key), Absent())
        self._changed.notify_all()

    def _fail(self, record: Record, error: BaseException) -> None:
        with self._changed:
            self._failures += 1
            if not self._records.is_current(record):
                return
            record.failures += 1
            now = self._clock()
            self._records.set_state(record, Failed(error, now, now + self._back_off.pause(record.failures)))

    def _load(self, record: Record) -> None:
        began, started = self._clock(), time.perf_counter()
        read = self._reading.read(record.key[0])
        seconds = time.perf_counter() - started
        with self._changed:
            held = self._find_room(record, read)
            if held is None or held.image is not None:
                self._publish(record, held, read.content, seconds, began)
                return
        started = time.perf_counter()
        image = self._lay_out(read, held)
        seconds += time.perf_counter() - started
        with self._changed:
            self._images.finish(held, image)
            self._moves.add(read.content.identity)
            try:
                self._publish(record, held, read.content, seconds, began)
            finally:
                self._images.drop_unshared(held, "forgotten")

    def _find_room(self, record: Record, read: ReadAdapter) -> HeldImage | None:
        """The room of an image: that of the same content once it is laid out, or new room, as soon as there is some.

        None when the registration was forgotten or the store closes.
        """
        patient = True
        while self._records.is_current(record) and not self._threads.closing.is_set():
            _check_expected(record, read.content)
            held = self._images.find(read.content.identity)
            if held is None:
                held = self._images.reserve(read.content, self._num_layers, read.heap_bytes, patient=patient)
                if held is not None:
                    return held
                self._cramped.add(record.key)
            elif held.image is not None:
                return held
            patient = self._changed.wait(_PATIENCE if patient else None)
            self._cramped.discard(record.key)
        return None

    def _lay_out(self, read: ReadAdapter, held: HeldImage) -> AdapterImage:
        try:
            return self._reading.lay_out(read, held.room)
        except BaseException:
            with self._changed:
                self._images.abandon(held)
            self._wake()
            raise

    def _publish(self, record: Record, held: HeldImage | None, content: Content, took: float, began: float) -> None:
        if held is None or held.image is None or not self._records.is_current(record):
            return
        _check_expected(record, content)
        self._times.note(content.identity, content.num_bytes, took)
        self._images.join(held, record.key)
        self._loads += 1
        record.content, record.expected, record.failures = held.content, content.identity, 0
        self._records.set_state(record, Ready(held.image, held.content, took, began, self._clock()))
        self._pin_held(record)
        self._changed.notify_all()

    def check_integrity(self) -> None:
        """AssertionError where blocks, bytes, pins, holds, registrations and images disagree."""
        with self._changed:
            check_books(self._images, self._records, self.held)
            loading = [record for record in self._records if isinstance(record.state, Loading)]
            assert self._threads.closing.is_set() or all(map(self._queue.holds, loading)), "nobody will load this"


def _check_expected(record: Record, content: Content) -> None:
    if record.expected not in (None, content.identity):
        raise AdapterChangedError(
            "the files have changed since they were registered; load the adapter again to serve them"
        )
