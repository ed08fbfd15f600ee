"""Paging in beside the steps: what is queued where, who waits for what, and that any order a GPU may take is right."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory import transfer
from loraplex.memory.adapter_image import AdapterImage, ImageLayout, MixtureLayout
from loraplex.memory.copy_stream import CopyEvent
from loraplex.memory.transfer import COPY_BYTES, AdapterTransfer, TransferStats

LAYERS, PAGES, ELEMS = 5, 24, 128
PAGE_BYTES = ELEMS * 4


class WatchedImage(AdapterImage):
    """An image of which one can tell whether anybody still holds it."""

    __slots__ = ("__weakref__",)


def image_of(num_pages: int, *, layers: int = LAYERS, elems: int = ELEMS) -> WatchedImage:
    layout = ImageLayout(({},), (MixtureLayout(),), (0,) * layers, {}, num_pages)
    return WatchedImage("identity", "lora", layout, (torch.randn(layers, num_pages, elems),))


@dataclass
class Operation:
    name: str
    run: Callable[[], Any] = lambda: None
    needs: FakeEvent | None = None


class FakeEvent:
    def __init__(self, device: FakeDevice, number: int, timed: bool) -> None:
        self.device, self.number, self.timed = device, number, timed
        self.done_at: int | None = None

    def is_done(self) -> bool:
        return self.done_at is not None

    def hold_back(self) -> None:
        self.device.compute.append(Operation(f"wait {self.number}", needs=self))

    def seconds_since(self, earlier: CopyEvent) -> float:
        assert isinstance(earlier, FakeEvent)
        assert self.timed
        assert earlier.timed
        assert self.done_at is not None
        assert earlier.done_at is not None
        return float(self.done_at - earlier.done_at)


@dataclass
class FakeDevice:
    """Two queues that a random executor runs in any order that their events allow. It has no call that waits."""

    compute: list[Operation] = field(default_factory=list)
    copying: list[Operation] = field(default_factory=list)
    clock: int = 0
    events: int = 0

    def _event(self, queue: list[Operation], timed: bool) -> FakeEvent:
        event = FakeEvent(self, self.events, timed)
        self.events += 1

        def mark() -> None:
            event.done_at = self.clock

        queue.append(Operation(f"event {event.number}", mark))
        return event

    def follow(self) -> None:
        event = self._event(self.compute, timed=False)
        self.copying.append(Operation(f"wait {event.number}", needs=event))

    def index(self, positions: list[int]) -> torch.Tensor:
        return torch.tensor(positions)

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in copies:
            assert target.is_contiguous()
            assert source.is_contiguous()
            self.copying.append(Operation(f"copy {source.nbytes}", partial(target.copy_, source)))

    def scatter(self, target: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
        assert source.is_contiguous()

        def run() -> None:
            target[:, index] = source

        self.copying.append(Operation(f"scatter {source.nbytes}", run))

    def record(self, *, timed: bool = False) -> FakeEvent:
        return self._event(self.copying, timed)

    def step(self, random_: random.Random) -> bool:
        """Run the head of one queue; False where neither can run."""
        ready = [q for q in (self.compute, self.copying) if q and (q[0].needs is None or q[0].needs.is_done())]
        if not ready:
            return False
        operation = random_.choice(ready).pop(0)
        self.clock += 1
        operation.run()
        return True

    def drain(self, seed: int = 0) -> None:
        random_ = random.Random(seed)
        while self.step(random_):
            pass
        assert not self.compute, "the computing stream waits for ever"
        assert not self.copying, "the copies wait for ever"

    @property
    def queued(self) -> list[str]:
        return [operation.name for operation in self.copying]


@dataclass
class Bench:
    """An arena on a fake device, and a transfer into it whose copies are at least ``copy_bytes``."""

    layers: int = LAYERS
    pages: int = PAGES
    device: FakeDevice = field(default_factory=FakeDevice)
    stats: TransferStats = field(default_factory=TransferStats)
    arena: torch.Tensor = field(init=False)
    transfer: AdapterTransfer = field(init=False)
    seen: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arena = torch.full((self.layers, self.pages, ELEMS), float("nan"))
        self.transfer = AdapterTransfer(self.arena, self.stats, self.device)

    def compute(self, run: Callable[[], Any]) -> None:
        self.device.compute.append(Operation("compute", run))

    def read(self, layer: int, pages: list[int]) -> None:
        self.compute(lambda: self.seen.append(self.arena[layer, pages].clone()))


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 4 * PAGE_BYTES)


@contextmanager
def copies_of(num_bytes: int) -> Any:
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(transfer, "COPY_BYTES", num_bytes)
        yield


def split(image: WatchedImage, cuts: set[int]) -> WatchedImage:
    """The same image in parts that begin at these layers."""
    bounds = [0, *sorted(cuts), image.num_layers]
    parts = tuple(image.data[a:b].clone() for a, b in pairwise(bounds))
    return WatchedImage(image.identity, image.kind, image.layout, parts)


part_cuts = st.sets(st.integers(1, LAYERS - 1))
page_lists = st.lists(st.integers(0, PAGES - 1), unique=True, min_size=1) | st.builds(
    lambda first, count: list(range(first, min(first + count, PAGES))), st.integers(0, PAGES - 1), st.integers(1, PAGES)
)


@settings(deadline=None, max_examples=150)
@given(
    pages=page_lists,
    cuts=part_cuts,
    copy_pages=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    order=st.permutations(range(LAYERS)),
)
def test_a_reader_that_waits_for_a_layer_sees_it_in_every_order(
    pages: list[int], cuts: set[int], copy_pages: int, seed: int, order: list[int]
) -> None:
    bench, image = Bench(), split(image_of(len(pages)), cuts)
    with copies_of(copy_pages * PAGE_BYTES):
        arrival = bench.transfer.page_in(image, pages)
    random_ = random.Random(seed)
    for layer in order:
        for _ in range(random_.randrange(4)):
            bench.device.step(random_)
        arrival.wait(layer)
        bench.read(layer, pages)
    bench.device.drain(seed)
    for layer, seen in zip(order, bench.seen):
        assert torch.equal(seen, image.data[layer])
    others = [page for page in range(PAGES) if page not in pages]
    assert bench.arena[:, others].isnan().all()
    assert arrival.is_complete()


@settings(deadline=None, max_examples=60)
@given(pages=page_lists, copy_pages=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_steps_before_a_transfer_read_what_was_there_and_steps_after_it_all_that_has_come(
    pages: list[int], copy_pages: int, seed: int
) -> None:
    bench, image = Bench(), image_of(len(pages))
    bench.compute(lambda: bench.arena.fill_(1.0))
    for layer in range(LAYERS):
        bench.read(layer, pages)
    with copies_of(copy_pages * PAGE_BYTES):
        arrival = bench.transfer.page_in(image, pages)
    arrival.wait_all()
    for layer in range(LAYERS):
        bench.read(layer, pages)
    bench.device.drain(seed)
    assert all((seen == 1.0).all() for seen in bench.seen[:LAYERS])
    assert torch.equal(torch.stack(bench.seen[LAYERS:]), image.data)


@settings(deadline=None, max_examples=60)
@given(pages=page_lists, copy_pages=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_pages_given_on_hold_what_came_last(pages: list[int], copy_pages: int, seed: int) -> None:
    """To another adapter without a wait; to keys and values once the computing stream waits."""
    bench, first, second = Bench(), image_of(len(pages)), image_of(len(pages))
    with copies_of(copy_pages * PAGE_BYTES):
        bench.transfer.page_in(first, pages)
        arrival = bench.transfer.page_in(second, list(reversed(pages)))
    arrival.wait_all()
    bench.read(LAYERS - 1, list(reversed(pages)))
    bench.compute(lambda: bench.arena.index_fill_(1, torch.tensor(pages), 3.0))
    bench.device.drain(seed)
    assert torch.equal(bench.seen[0], second.data[LAYERS - 1])
    assert (bench.arena[:, pages] == 3.0).all()


@pytest.mark.usefixtures("small_copies")
def test_large_runs_are_copied_layer_by_layer_with_an_event_each() -> None:
    bench = Bench(layers=2)
    bench.transfer.page_in(image_of(8, layers=2), [3, 4, 5, 6, 10, 11, 12, 13])
    run = f"copy {4 * PAGE_BYTES}"
    assert bench.device.queued == ["wait 0", "event 1", run, run, "event 2", run, run, "event 3"]
    assert [operation.name for operation in bench.device.compute] == ["event 0"]


@pytest.mark.usefixtures("small_copies")
def test_scattered_pages_are_staged_by_layers_until_a_copy_is_large_enough() -> None:
    bench = Bench(layers=5)
    bench.transfer.page_in(image_of(2, layers=5), [9, 3])
    two, one = f"scatter {4 * PAGE_BYTES}", f"scatter {2 * PAGE_BYTES}"
    assert bench.device.queued == ["wait 0", "event 1", two, "event 2", two, "event 3", one, "event 4"]


@pytest.mark.usefixtures("small_copies")
def test_no_copy_goes_over_the_end_of_a_part() -> None:
    bench = Bench(layers=5)
    bench.transfer.page_in(split(image_of(2, layers=5), {1, 4}), [9, 3])
    two, one = f"scatter {4 * PAGE_BYTES}", f"scatter {2 * PAGE_BYTES}"
    assert [name for name in bench.device.queued if name.startswith("scatter")] == [one, two, one, one]


@pytest.mark.usefixtures("small_copies")
def test_small_adapters_go_in_one_copy_even_where_their_pages_are_one_run() -> None:
    bench = Bench(layers=3)
    bench.transfer.page_in(image_of(1, layers=3), [9])
    assert bench.device.queued == ["wait 0", "event 1", f"scatter {3 * PAGE_BYTES}", "event 2"]


@pytest.mark.usefixtures("small_copies")
def test_copies_are_large_on_average_whatever_the_pages() -> None:
    for pages in ([0], [0, 2], list(range(PAGES)), list(range(0, PAGES, 2)), [*range(9), *range(12, 20)]):
        bench = Bench()
        image = image_of(len(pages))
        bench.transfer.page_in(image, pages)
        copies = sum(name.startswith(("copy", "scatter")) for name in bench.device.queued)
        assert copies == 1 or image.data.nbytes >= (copies - 1) * 4 * PAGE_BYTES


def test_a_copy_takes_about_as_long_as_it_takes_to_queue() -> None:
    assert 256 << 10 <= COPY_BYTES <= 1 << 20


@pytest.mark.usefixtures("small_copies")
def test_the_computing_stream_waits_once_for_what_it_reads_and_not_at_all_for_what_has_come() -> None:
    bench = Bench()
    arrival = bench.transfer.page_in(image_of(4), [1, 2, 3, 4])  # a part for each layer
    for layer in (0, 0, 2, 1, 2):
        arrival.wait(layer)
    assert [op.name for op in bench.device.compute] == ["event 0", "wait 2", "wait 4"]
    arrival.wait_all()
    arrival.wait(4)
    assert bench.device.compute[-1].name == "wait 6"
    assert len(bench.device.compute) == 4
    bench.device.drain()
    arrival.wait(0)
    arrival.wait_all()
    assert not bench.device.compute


@pytest.mark.usefixtures("small_copies")
def test_an_image_lives_until_it_has_arrived_and_no_longer() -> None:
    bench = Bench()
    image = image_of(4)
    data, watched = image.data.clone(), weakref.ref(image)
    arrival = bench.transfer.page_in(image, [7, 3, 11, 5])
    del image
    assert watched() is not None
    bench.transfer.collect()
    assert not arrival.is_complete()
    bench.device.drain()
    assert torch.equal(bench.arena[:, [7, 3, 11, 5]], data)
    bench.transfer.collect()
    assert watched() is None
    assert arrival.is_complete()


@pytest.mark.usefixtures("small_copies")
def test_the_transfer_keeps_images_whose_arrivals_nobody_keeps() -> None:
    bench = Bench()
    image = image_of(3)
    watched = weakref.ref(image)
    bench.transfer.page_in(image, [7, 3, 11])
    del image
    assert watched() is not None
    bench.device.drain()
    bench.transfer.page_in(image_of(1), [0])
    assert watched() is None


@pytest.mark.usefixtures("small_copies")
def test_bytes_and_seconds_are_counted_once_and_without_the_wait_for_earlier_steps() -> None:
    bench = Bench()
    for _ in range(50):
        bench.compute(lambda: None)
    arrival = bench.transfer.page_in(image_of(4), [1, 2, 3, 4])
    assert bench.stats == TransferStats()
    bench.device.drain()
    assert arrival.is_complete()
    assert arrival.is_complete()
    bench.transfer.collect()
    assert (bench.stats.adapters, bench.stats.num_bytes) == (1, LAYERS * 4 * PAGE_BYTES)
    assert bench.stats.seconds == 2 * LAYERS  # a copy and an event for each layer


def test_on_the_cpu_an_adapter_has_arrived_at_once() -> None:
    arena, stats, image = torch.full((LAYERS, PAGES, ELEMS), float("nan")), TransferStats(), image_of(3)
    arrival = AdapterTransfer(arena, stats).page_in(image, [4, 9, 2])
    arrival.wait(LAYERS - 1)
    arrival.wait_all()
    assert arrival.is_complete()
    assert torch.equal(arena[:, [4, 9, 2]], image.data)
    assert (stats.adapters, stats.num_bytes) == (1, image.data.nbytes)
    assert stats.seconds > 0


def test_an_image_of_no_pages_queues_nothing() -> None:
    bench = Bench()
    assert bench.transfer.page_in(image_of(0), []).is_complete()
    assert not bench.device.copying


def test_what_does_not_fit_is_refused_before_anything_is_queued() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="2 pages for an image of 3"):
        bench.transfer.page_in(image_of(3), [1, 2])
    with pytest.raises(ValueError, match="the arena has 0 to 23"):
        bench.transfer.page_in(image_of(1), [PAGES])
    with pytest.raises(ValueError, match="does not fit an arena"):
        bench.transfer.page_in(image_of(1, elems=256), [0])
    assert not bench.device.copying
    assert not bench.device.compute
