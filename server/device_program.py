"""One shape of step on a device: where its arrays lie, what it runs, and the graph that replays it.

A captured graph holds addresses and grids. Both follow from ``Capacities`` alone: what a step does not use of them is
filled with work that does nothing. So one graph serves every step that fits, whatever its mix of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.device_adapters import Arriving, ChoiceLog, DeviceAdapters
from loraplex.kernels.flashinfer_attention import FlashInferAttention
from loraplex.kernels.graph_memory import borrowed
from loraplex.kernels.lora_launch import StepWork
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists
from loraplex.kernels.paged_attention import PagedPlan
from loraplex.kernels.routed_lists import DeviceRouted
from loraplex.kernels.step_buffers import BufferLayout, HostRing
from loraplex.server.decoder import Decoder, DecoderInput
from loraplex.server.device_batch import DeviceBatch
from loraplex.server.device_capacities import (
    Capacities,
    EntryCapacity,
    RoutedCapacity,
    bucket,
    step_fields,
    work_arrays,
    work_fields,
)
from loraplex.server.device_entries import StepEntries


@dataclass(frozen=True, slots=True)
class Machine:
    """What all steps of a device share.

    Attributes:
        decoder: with paged attention.
        arena: [num_layers, num_pages, page_elems].
        table: of the adapters in the pool.
        page_table: [2 * sequences + 1, pages] int32: of the rows that decode, and behind ``max_sequences`` of prompts.
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

    @property
    def max_sequences(self) -> int:
        return len(self.page_table) // 2


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
        size, pages, table = self.layout.size, batch.pages, self._machine.page_table
        keeps = batch.logit_entries is None and self._work is batch.entries
        work_stop = size if keeps else size + self.work_layout.size
        stop = work_stop + pages.size
        host, filled = ring.next(stop)
        self.layout.fill(filled[:size], batch.arrays)
        copies = [(host[:size], self.buffer)]
        if work_stop > size:
            self.work_layout.fill(filled[size:work_stop], work_arrays(batch))
            copies.append((host[size:work_stop], self.work_buffer))
            self._work = batch.entries
        filled[work_stop:stop].reshape(pages.shape)[:] = pages
        (num_rows, width), decodes = pages.shape, batch.num_decodes
        source = host[work_stop:stop].view(num_rows, width)
        if decodes:
            copies.append((source[:decodes], table[:decodes, :width]))
        if decodes < num_rows:
            first = self._machine.max_sequences
            copies.append((source[decodes:], table[first : first + num_rows - decodes, :width]))
        ring.send(copies)

    def fits(self, batch: DeviceBatch) -> bool:
        """Whether this is surely the shape of a step that only decodes, having been that of the last one."""
        tiles = self.capacities.decode_tiles
        return (
            batch.entries is self._work
            and batch.only_decodes
            and bucket(batch.num_rows) == self.capacities.rows
            and all(len(batch.arrays[f"tiles_{window}"]) <= count for window, count in tiles)
        )

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
        self._flashinfer.plan(pages, lengths, row_starts - row_starts[0], given.get("prompt_lengths", none))

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
        adapters = self._adapters(batch, arriving, log)
        logit_adapters = adapters if has.logits is None else self._logit_adapters(batch, arriving)
        step = DecoderInput(tokens, self._plan(), adapters, views.get("logit_rows"), logit_adapters)
        return machine.decoder.forward(step, machine.arena)

    def _plan(self) -> PagedPlan:
        views, has = self._views, self.capacities
        none, table, first = self.buffer[:0], self._machine.page_table, self._machine.max_sequences
        tiles = {window: (views[f"tiles_{window}"], views[f"tile_starts_{window}"]) for window, _ in has.decode_tiles}
        return PagedPlan(
            views["positions"],
            views["slots"],
            views["lengths"],
            table[: has.decodes],
            tiles,
            views.get("row_starts", none),
            views.get("prompt_lengths", none),
            table[first : first + has.prompts],
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
            machine.beside if batch is None else None,
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
        has = capacity
        named = self._named(prefix)
        return DeviceRouted.of(named, has.most, has.max_experts, has.block_rows, has.sites, has.gains)

    def _named(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{prefix}."
        return {name.removeprefix(start): view for name, view in self._views.items() if name.startswith(start)}
