"""One shape of step on a device: where its arrays lie, what it runs, and the graph that replays it.

A captured graph holds addresses and grids. Both follow from ``Capacities`` alone: what a step does not use of them is
filled with work that does nothing. So one graph serves every step that fits, whatever its mix of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels import lora_tiles, routed_lists
from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.device_adapters import Arriving, ChoiceLog, DeviceAdapters
from loraplex.kernels.flashinfer_attention import FlashInferAttention
from loraplex.kernels.graph_memory import borrowed
from loraplex.kernels.lora_launch import StepWork
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists
from loraplex.kernels.paged_attention import PagedPlan
from loraplex.kernels.paged_decode import MAX_SPLITS, SPLIT_KEYS
from loraplex.kernels.routed_lists import DeviceRouted, RoutedLists
from loraplex.kernels.step_buffers import BufferLayout, Field, HostRing
from loraplex.server.decoder import Decoder, DecoderInput
from loraplex.server.device_batch import DeviceBatch
from loraplex.server.device_entries import StepEntries

Array = npt.NDArray[Any]

NO_TABLE = -1
"""Stands for the generation of a table where a step does not depend on it."""

_FLOATS = ("weights", "top_p", "temperature")


@dataclass(frozen=True, slots=True)
class EntryCapacity:
    """Of lists of entries: entries, tiles (a power of two), rows that are sums (0: no row has two entries)."""

    entries: int
    tiles: int
    sums: int
    block_rows: int


@dataclass(frozen=True, slots=True)
class RoutedCapacity:
    """Of lists of routed entries: entries, tiles, slots of an entry, experts of a router."""

    entries: int
    tiles: int
    most: int
    max_experts: int
    block_rows: int


@dataclass(frozen=True, slots=True)
class Capacities:
    """What a step may hold, and all else that its launches depend on.

    Attributes:
        rows, decodes: of the step; a step without prompts has as many of one as of the other.
        decode_tiles: by window.
        prompts, prefill_tiles: of chunks of prompts.
        logits: rows whose logits are wanted; None: all rows, in order.
        entries, linear, ffn: the adapters' work on the rows.
        logit_entries: on the logit rows.
        model_sites: the model sites that any adapter in the pool has.
        generation: of the adapter table; ``NO_TABLE`` where there is no work for adapters.
    """

    rows: int
    decodes: int
    decode_tiles: tuple[tuple[int | None, int], ...]
    prompts: int = 0
    prefill_tiles: int = 0
    logits: int | None = None
    entries: EntryCapacity | None = None
    linear: RoutedCapacity | None = None
    ffn: RoutedCapacity | None = None
    logit_entries: EntryCapacity | None = None
    model_sites: frozenset[str] = frozenset()
    generation: int = NO_TABLE


@dataclass(frozen=True, slots=True)
class Machine:
    """What all steps of a device share.

    Attributes:
        decoder: with paged attention.
        arena: [num_layers, num_pages, page_elems].
        table: of the adapters in the pool.
        page_table: [sequences, pages] int32.
        sampled: [sequences] int64, the tokens that the last launch sampled.
        beside: a stream for what can run beside the base's products; None runs all in order.
        flashinfer: makes FlashInfer's kernels for steps of so many rows that decode (0: for any step), where those are
            used in place of ours.
    """

    decoder: Decoder
    arena: torch.Tensor
    table: AdapterTable
    page_table: torch.Tensor
    sampled: torch.Tensor
    beside: torch.cuda.Stream | None = None
    flashinfer: Callable[[int], FlashInferAttention] | None = None

    @property
    def device(self) -> torch.device:
        return self.arena.device


def bucket(count: int) -> int:
    """The capacity that ``count`` rows are padded to: at most half as many again, and few different ones."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    step = 8 if count <= 64 else 16 if count <= 128 else 32
    return -(-count // step) * step


def exact_capacities(batch: DeviceBatch, model_sites: frozenset[str], generation: int) -> Capacities:
    """Just what a step needs."""
    arrays = batch.arrays
    prompts = len(batch.chunks) - batch.num_decodes
    capacities = Capacities(
        rows=batch.num_rows,
        decodes=batch.num_decodes,
        decode_tiles=tuple(_count_tiles(arrays).items()),
        prompts=prompts,
        prefill_tiles=len(arrays["prefill_tiles"]) if prompts else 0,
        logits=None if batch.logit_entries is None else len(arrays["logit_rows"]),
        entries=_entries(batch.entries.lists, None),
        linear=_routed(batch.entries.linear, None),
        ffn=_routed(batch.entries.ffn, None),
        logit_entries=None if batch.logit_entries is None else _entries(batch.logit_entries.lists, None),
    )
    return _with_table(capacities, model_sites, generation)


def bucket_capacities(batch: DeviceBatch, pool_tokens: int, model_sites: frozenset[str], generation: int) -> Capacities:
    """What the bucket of a step that only decodes needs, whatever the lengths and the mix of its rows.

    Args:
        pool_tokens: whose keys fit the pool: so many are split among tiles, unless sequences share pages.
    """
    rows = bucket(batch.num_rows)
    capacities = replace(
        empty_bucket(rows, pool_tokens, _count_tiles(batch.arrays)),
        entries=_entries(batch.entries.lists, rows),
        linear=_routed(batch.entries.linear, rows),
        ffn=_routed(batch.entries.ffn, rows),
    )
    return _with_table(capacities, model_sites, generation)


def empty_bucket(rows: int, pool_tokens: int, tiles: Mapping[int | None, int]) -> Capacities:
    """A bucket of rows that decode and have no adapters; ``tiles`` are needed of each window."""
    usual = 2 * rows + pool_tokens // SPLIT_KEYS
    return Capacities(
        rows=rows,
        decodes=rows,
        decode_tiles=tuple(
            # Sequences that begin alike share pages, and may have more keys between them than the pool.
            (window, min(rows * MAX_SPLITS, max(usual, _power_of_two(count))))
            for window, count in tiles.items()
        ),
    )


def usual_buckets(
    max_rows: int, pool_tokens: int, windows: Sequence[int | None], generation: int
) -> Iterator[Capacities]:
    """What decoding mostly needs: every bucket of rows, without adapters and with one adapter a row."""
    for rows in sorted({bucket(count) for count in range(1, max_rows + 1)}):
        plain = empty_bucket(rows, pool_tokens, dict.fromkeys(windows, rows))
        yield plain
        entries = EntryCapacity(rows, _power_of_two(rows), 0, lora_tiles.ROW_BLOCKS[0])
        yield _with_table(replace(plain, entries=entries), frozenset(), generation)


def _with_table(capacities: Capacities, model_sites: frozenset[str], generation: int) -> Capacities:
    has = capacities
    if has.entries is None and has.linear is None and has.ffn is None and has.logit_entries is None:
        return has
    return replace(has, model_sites=model_sites, generation=generation)


def _count_tiles(arrays: Mapping[str, Array]) -> dict[int | None, int]:
    found = {name.removeprefix("tiles_"): len(array) for name, array in arrays.items() if name.startswith("tiles_")}
    return {None if name == "None" else int(name): count for name, count in found.items()}


def _entries(lists: EntryLists | None, rows: int | None) -> EntryCapacity | None:
    """Exact, or for any entries of so many rows: one each, or a power of two in all where some row has two."""
    if lists is None:
        return None
    count, tiles, sums = len(lists.order), len(lists.tile_units), 0 if lists.sum_rows is None else len(lists.sum_rows)
    if rows is not None:
        count = max(_power_of_two(count), rows) if sums else rows
        tiles, sums = count, rows if sums else 0
    return EntryCapacity(count, _power_of_two(tiles), sums, lists.block_rows)


def _routed(lists: RoutedLists | None, rows: int | None) -> RoutedCapacity | None:
    if lists is None:
        return None
    count, tiles = len(lists.units), len(lists.tile_units)
    if rows is not None:
        count = max(_power_of_two(count), rows) if count > rows else rows
        tiles = count
    return RoutedCapacity(count, tiles, lists.most, lists.max_experts, lists.block_rows)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def step_fields(capacities: Capacities) -> dict[str, Field]:
    """The arrays of a step that change with every step, by name."""
    found = {name: Field((capacities.rows,)) for name in ("tokens", "positions")}
    found |= {name: Field((capacities.rows,), padding=-1) for name in ("sources", "slots")}
    found["lengths"] = Field((capacities.decodes,))
    for window, tiles in capacities.decode_tiles:
        found[f"tiles_{window}"] = Field((tiles, 2))
        found[f"tile_starts_{window}"] = Field((capacities.decodes + 1,), padding=None)
    if capacities.prompts:
        found["row_starts"] = Field((capacities.prompts + 1,))
        found["prompt_lengths"] = Field((capacities.prompts,))
        found["prefill_tiles"] = Field((capacities.prefill_tiles, 2))
    if capacities.logits is not None:
        found["logit_rows"] = Field((capacities.logits,))
    return found


def work_fields(capacities: Capacities) -> dict[str, Field]:
    """The arrays of the adapters' work, which stay as long as rows keep their adapters, by name."""
    found = _entry_fields("entries", capacities.entries)
    found |= _entry_fields("logit_entries", capacities.logit_entries)
    found |= _routed_fields("linear", capacities.linear)
    found |= _routed_fields("ffn", capacities.ffn)
    return found


def _entry_fields(prefix: str, capacity: EntryCapacity | None) -> dict[str, Field]:
    if capacity is None:
        return {}
    sizes = dict.fromkeys(("tile_units", "tile_firsts", "tile_counts"), capacity.tiles)
    sizes |= {"sum_rows": capacity.sums, "sum_starts": capacity.sums + 1}
    names = ["x_rows", "y_rows", "slots", "weights", "tile_units", "tile_firsts", "tile_counts"]
    names += ["sum_rows", "sum_starts", "slot_units"] if capacity.sums else []
    padding: dict[str, int | None] = {**lora_tiles.PADDING, "sum_starts": None}
    return {
        f"{prefix}.{name}": Field((sizes.get(name, capacity.entries),), name in _FLOATS, padding[name])
        for name in names
    }


def _routed_fields(prefix: str, capacity: RoutedCapacity | None) -> dict[str, Field]:
    if capacity is None:
        return {}
    sizes = dict.fromkeys(("tile_units", "tile_firsts", "tile_counts"), capacity.tiles)
    sizes["slot_starts"] = capacity.entries + 1
    return {
        f"{prefix}.{name}": Field((sizes.get(name, capacity.entries),), name in _FLOATS, padding)
        for name, padding in routed_lists.PADDING.items()
    }


def work_arrays(batch: DeviceBatch) -> dict[str, Array]:
    """The arrays of a batch under the names of ``work_fields``."""
    entries, logit_entries = batch.entries, batch.logit_entries
    named = {
        "entries": entries.lists,
        "logit_entries": None if logit_entries is None else logit_entries.lists,
        "linear": entries.linear,
        "ffn": entries.ffn,
    }
    return {
        f"{prefix}.{name}": array
        for prefix, lists in named.items()
        if lists is not None
        for name, array in lists.arrays().items()
    }


class StepProgram:
    """Steps of one shape.

    Args:
        capacities: of the shape.
        machine: that runs them.
        flashinfer: FlashInfer's kernels, where they are used.

    Attributes:
        layout, work_layout: where the arrays of a step, and those of the adapters' work, lie in their buffers.
        buffer, work_buffer: [size] int32 on the device; the host's are copied here before a run.
    """

    def __init__(self, capacities: Capacities, machine: Machine, flashinfer: FlashInferAttention | None = None) -> None:
        self.capacities = capacities
        self._flashinfer = flashinfer
        self.layout = BufferLayout(step_fields(capacities))
        self.work_layout = BufferLayout(work_fields(capacities))
        self.buffer = torch.zeros(self.layout.size, dtype=torch.int32, device=machine.device)
        self.work_buffer = torch.zeros(self.work_layout.size, dtype=torch.int32, device=machine.device)
        self._machine = machine
        self._views = {**self.layout.views(self.buffer), **self.work_layout.views(self.work_buffer)}
        self._work: StepEntries | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def send(self, batch: DeviceBatch, ring: HostRing) -> None:
        """Queue the copies of a step's arrays; those of the adapters' work only where it is another than the last."""
        self.plan_attention(batch)
        size, pages = self.layout.size, batch.pages
        keeps = batch.logit_entries is None and self._work is batch.entries
        work_size = 0 if keeps else self.work_layout.size
        host = ring.next(size + work_size + pages.size)
        filled = host.numpy()
        self.layout.fill(filled[:size], batch.arrays)
        copies = [(host[:size], self.buffer)]
        if work_size:
            self.work_layout.fill(filled[size : size + work_size], work_arrays(batch))
            copies.append((host[size : size + work_size], self.work_buffer))
            self._work = batch.entries
        np.copyto(filled[size + work_size :].reshape(pages.shape), pages)
        table = self._machine.page_table[: pages.shape[0], : pages.shape[1]]
        ring.send([*copies, (host[size + work_size :].view(pages.shape), table)])

    def plan_attention(self, batch: DeviceBatch | None) -> None:
        """Tell FlashInfer of a step, where it is used; None: of one whose rows all pad."""
        if self._flashinfer is None:
            return
        rows, none = self.capacities.decodes + self.capacities.prompts, np.zeros(0, dtype=np.int32)
        given = {} if batch is None else batch.arrays
        pages = np.zeros((rows, 1), dtype=np.int32)
        if batch is not None:
            pages = np.zeros((rows, batch.pages.shape[1]), dtype=np.int32)
            pages[: len(batch.pages)] = batch.pages
        lengths = np.zeros(self.capacities.decodes, dtype=np.int32)
        lengths[: len(given.get("lengths", none))] = given.get("lengths", none)
        row_starts = given.get("row_starts", np.zeros(1, dtype=np.int32))
        self._flashinfer.plan(pages, lengths, row_starts, given.get("prompt_lengths", none))

    def capture(self, pool: Any) -> None:
        """Record the launches, which must have been compiled by a run before. Nothing runs.

        Args:
            pool: of memory that all graphs of the device share; they never run at once.
        """
        graph = torch.cuda.CUDAGraph()
        # Threads that read adapters allocate page-locked memory, which must not spoil what this one records.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self.run()
        self._graph, self._logits = graph, borrowed(logits)

    def replay(self) -> torch.Tensor:
        """Run the captured step; its logits stand until the next replay of any graph."""
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def run(
        self,
        batch: DeviceBatch | None = None,
        arriving: Sequence[Arriving] = (),
        log: ChoiceLog | None = None,
    ) -> torch.Tensor:
        """[logits, vocabulary] float32 of the step in the buffer.

        Args:
            batch: the step, if the run is for it alone; then no launch has idle blocks.
            arriving: adapters of the step that are on their way.
            log: where choices of experts are noted.
        """
        machine, views, has = self._machine, self._views, self.capacities
        sources = views["sources"]
        known = machine.sampled.index_select(0, sources.clamp(min=0)).to(torch.int32)
        tokens = torch.where(sources >= 0, known, views["tokens"])
        step = DecoderInput(
            tokens,
            self._plan(),
            self._adapters(batch, arriving, log),
            views.get("logit_rows"),
            self._logit_adapters(batch, arriving),
        )
        if has.logits is None and step.adapters is not None and has.model_sites:
            step = DecoderInput(tokens, step.attention, step.adapters, None, step.adapters)
        return machine.decoder.forward(step, machine.arena)

    def _plan(self) -> PagedPlan:
        views, has = self._views, self.capacities
        none = self.buffer[:0]
        tiles = {window: (views[f"tiles_{window}"], views[f"tile_starts_{window}"]) for window, _ in has.decode_tiles}
        return PagedPlan(
            views["positions"],
            views["slots"],
            has.decodes,
            self._machine.page_table[: has.decodes + has.prompts],
            views["lengths"],
            tiles,
            views.get("row_starts", none),
            views.get("prompt_lengths", none),
            views.get("prefill_tiles", none),
            self._flashinfer,
        )

    def _adapters(
        self, batch: DeviceBatch | None, arriving: Sequence[Arriving], log: ChoiceLog | None
    ) -> DeviceAdapters | None:
        has, machine = self.capacities, self._machine
        if has.entries is None and has.linear is None and has.ffn is None:
            return None
        lists = None if batch is None else batch.entries
        return DeviceAdapters(
            machine.table,
            self._entries("entries", has.entries, None if lists is None else lists.lists),
            self._routed("linear", has.linear),
            self._routed("ffn", has.ffn),
            has.model_sites,
            arriving,
            None if lists is None else lists.linear,
            None if lists is None else lists.ffn,
            log,
            machine.beside,
        )

    def _logit_adapters(self, batch: DeviceBatch | None, arriving: Sequence[Arriving]) -> DeviceAdapters | None:
        has = self.capacities
        if has.logit_entries is None or not has.model_sites:
            return None
        lists = None if batch is None or batch.logit_entries is None else batch.logit_entries.lists
        entries = self._entries("logit_entries", has.logit_entries, lists)
        return DeviceAdapters(self._machine.table, entries, model_sites=has.model_sites, arriving=arriving)

    def _entries(
        self, prefix: str, capacity: EntryCapacity | None, lists: EntryLists | None
    ) -> tuple[DeviceEntries, StepWork] | None:
        if capacity is None:
            return None
        entries, machine = DeviceEntries.of(self._named(prefix), capacity.block_rows), self._machine
        return entries, StepWork.of(entries, machine.table, machine.arena.dtype, lists=lists)

    def _routed(self, prefix: str, capacity: RoutedCapacity | None) -> DeviceRouted | None:
        if capacity is None:
            return None
        return DeviceRouted.of(self._named(prefix), capacity.most, capacity.max_experts, capacity.block_rows)

    def _named(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{prefix}."
        return {name.removeprefix(start): view for name, view in self._views.items() if name.startswith(start)}
