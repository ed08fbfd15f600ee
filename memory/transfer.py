"""Paging in: an adapter image from the host store into its pages of the pool."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.copy_stream import CopyEvent, CopyStream, CudaCopyStream

_MAX_SLICES = 8
"""Up to so many runs of pages are copied as slices on a GPU; with more of them one scatter is quicker there."""

COPY_BYTES = 512 << 10
"""Bytes of one copy to a GPU at least, on average, where the image is that large. A PCIe link of 25 to 50 GB/s takes
10 to 20 us for them, about what the host needs to queue a copy, a scatter and an event: with smaller ones the link, and
the step loop that queues them, would wait for launches."""


@dataclass(slots=True)
class TransferStats:
    """What has been paged in since the start: adapters, their bytes, and the seconds that copies took, without the time
    that they waited for their turn. Counted when a copy is known done.

    Attributes:
        recent: seconds of each adapter since ``take_recent``.
    """

    adapters: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)

    def take_recent(self) -> list[float]:
        """The seconds of each adapter that arrived since the last call."""
        recent, self.recent = self.recent, []
        return recent


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """Copies that are queued.

    Attributes:
        image: what they read; kept until they are done.
        part_of_layer: for each layer, the part that brings it.
        events: for each part, an event behind its copies. The last one is timed.
        begun: a timed event before the first copy.
        stats: counts the bytes and the time.
    """

    image: AdapterImage
    part_of_layer: Sequence[int]
    events: Sequence[CopyEvent]
    begun: CopyEvent
    stats: TransferStats


class Arrival:
    """An adapter on its way into the pool, in parts of whole layers, each with an event.

    Of model sites each row lies in another layer (see ``SiteLayout``), so they need ``wait_all``.

    The waits make the computing stream wait, never the host, and count on one computing stream: what it has been made
    to wait for once, it is not made to wait for again. Neither they nor ``is_complete`` may run while a CUDA graph is
    captured: before a graph that reads the adapter is replayed, call ``wait_all``.

    Args:
        under_way: the copies; None where they are done.
    """

    def __init__(self, under_way: _UnderWay | None = None) -> None:
        self._under_way = under_way
        self._waited = 0

    def is_complete(self) -> bool:
        """Whether all has arrived; never waits. Once it has, the image is let go."""
        if self._under_way is None:
            return True
        last = self._under_way.events[-1]
        if not last.is_done():
            return False
        _count(self._under_way.stats, self._under_way.image, last.seconds_since(self._under_way.begun))
        self._under_way = None
        return True

    def wait(self, layer: int) -> None:
        """Let the computing stream wait until a layer and those before it have arrived."""
        if self._under_way is not None:
            self._wait_for_parts(self._under_way, self._under_way.part_of_layer[layer] + 1)

    def wait_all(self) -> None:
        """Let the computing stream wait until everything has arrived."""
        if self._under_way is not None:
            self._wait_for_parts(self._under_way, len(self._under_way.events))

    def _wait_for_parts(self, under_way: _UnderWay, count: int) -> None:
        if count > self._waited and not self.is_complete():
            under_way.events[count - 1].hold_back()  # parts arrive in order
            self._waited = count


class AdapterTransfer:
    """Pages adapters in beside the steps: no step waits for one that it does not read.

    On CUDA the copies are queued on a stream of their own. They begin once all that the computing stream has been given
    so far is done, for it may still read what those pages held; what it is given later runs beside them. The host never
    waits, if images lie in page-locked memory. Elsewhere an adapter is copied at once.

    Before the pages of an adapter that has not arrived are given to anyone but another adapter, the computing stream
    must be made to wait by ``Arrival.wait_all``. Copies into the same pages are done in order.

    No method may be called while a CUDA graph is captured.

    Args:
        arena: [num_layers, num_pages, page_elems].
        stats: counts what arrives.
        stream: that copies; by default one of the arena's device, or none where copies are done at once.
    """

    def __init__(self, arena: torch.Tensor, stats: TransferStats, stream: CopyStream | None = None) -> None:
        self._arena = arena
        self._stats = stats
        self._stream = CudaCopyStream(arena.device) if stream is None and arena.is_cuda else stream
        self._under_way: list[Arrival] = []

    def page_in(self, image: AdapterImage, pages: list[int]) -> Arrival:
        """Copy an image into pages of the arena, or begin to.

        Args:
            image: of n pages, on the host. It is kept until it has arrived, whoever lets go of it.
            pages: the n pages, distinct; page ``i`` of the image goes to ``pages[i]`` in every layer.

        Errors: ValueError where the shapes, the dtypes or the number of pages do not fit.
        """
        _check(image, self._arena, pages)
        self.collect()
        if self._stream is None or not pages:
            started = time.perf_counter()
            page_in(image, self._arena, pages)
            _count(self._stats, image, time.perf_counter() - started)
            return Arrival()
        arrival = self._queue(self._stream, image, pages)
        self._under_way.append(arrival)
        return arrival

    def collect(self) -> None:
        """Count what has arrived and let go of its images; call it once a step. Never waits."""
        self._under_way = [arrival for arrival in self._under_way if not arrival.is_complete()]

    def _queue(self, stream: CopyStream, image: AdapterImage, pages: list[int]) -> Arrival:
        layer_bytes = image.layer(0).nbytes
        runs = _runs(pages)
        as_slices = layer_bytes >= COPY_BYTES * len(runs)
        step = 1 if as_slices else -(-COPY_BYTES // layer_bytes)
        index = None if as_slices else stream.index(pages)
        stream.follow()
        begun = stream.record(timed=True)
        events: list[CopyEvent] = []
        part_of_layer: list[int] = []
        for first, data in _portions(image, step):
            target = self._arena[first : first + data.shape[0]]
            if index is None:
                stream.copy(_slices(data[0], target[0], pages, runs))
            else:
                stream.scatter(target, index, data)
            part_of_layer += [len(events)] * data.shape[0]
            events.append(stream.record(timed=len(part_of_layer) == image.num_layers))
        return Arrival(_UnderWay(image, part_of_layer, events, begun, self._stats))


def _portions(image: AdapterImage, step: int) -> Iterator[tuple[int, torch.Tensor]]:
    """An image's layers by up to ``step`` that follow one another in memory: the first layer, and their rows."""
    first = 0
    for part in image.parts:
        for data in part.split(step):
            yield first, data
            first += data.shape[0]


def page_in(image: AdapterImage, arena: torch.Tensor, pages: list[int]) -> None:
    """Copy an image into pages of the arena: for each of its parts one copy to the device and one scatter.

    Args:
        image: of n pages, on the host.
        arena: [num_layers, num_pages, page_elems], same dtype, on any device.
        pages: the n pages, distinct; page ``i`` of the image goes to ``pages[i]`` in every layer. Ascending runs are
            copied as slices.

    On CUDA, from pinned memory, the copies are queued on the current stream and the call returns before they are done.
    Errors: ValueError where the shapes, the dtypes or the number of pages do not fit.
    """
    _check(image, arena, pages)
    runs = _runs(pages)
    for first, rows in _portions(image, image.num_layers):
        target = arena[first : first + rows.shape[0]]
        data = rows.to(arena.device, non_blocking=True)
        if len(runs) > _MAX_SLICES and arena.is_cuda:
            target.index_copy_(1, torch.tensor(pages, device=arena.device), data)
        else:
            for start, stop in runs:
                target[:, pages[start] : pages[start] + stop - start].copy_(data[:, start:stop])


def _count(stats: TransferStats, image: AdapterImage, seconds: float) -> None:
    stats.adapters += 1
    stats.num_bytes += sum(part.nbytes for part in image.parts)
    stats.seconds += seconds
    stats.recent.append(seconds)


def _slices(
    data: torch.Tensor, layer: torch.Tensor, pages: list[int], runs: list[tuple[int, int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies (target, source) of one layer's runs: ``data [n, elems]`` into ``layer [num_pages, elems]``."""
    return [(layer[pages[start] : pages[start] + stop - start], data[start:stop]) for start, stop in runs]


def _check(image: AdapterImage, arena: torch.Tensor, pages: list[int]) -> None:
    dtype, (_, count, elems) = image.parts[0].dtype, image.parts[0].shape
    if (image.num_layers, elems, dtype) != (arena.shape[0], arena.shape[2], arena.dtype):
        raise ValueError(
            f"an image of {image.num_layers} layers and {elems} elements a page, {dtype}, does not fit an arena "
            f"{tuple(arena.shape)} of {arena.dtype}"
        )
    if len(pages) != count:
        raise ValueError(f"{len(pages)} pages for an image of {count}")
    if pages and not 0 <= min(pages) <= max(pages) < arena.shape[1]:
        raise ValueError(f"pages from {min(pages)} to {max(pages)}; the arena has 0 to {arena.shape[1] - 1}")


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """The maximal ``[start, stop)`` of positions whose pages follow one another."""
    breaks = [i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1]
    return [(a, b) for a, b in zip([0, *breaks], [*breaks, len(pages)], strict=True) if a < b]
