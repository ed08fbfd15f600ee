"""What the host keeps of each running sequence from step to step, as rows of arrays.

A step's arrays are gathered from these by a few array operations, however many sequences there are; what has to be
looked up sequence by sequence is looked up when a sequence comes in, and when its page list has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.memory.kv_cache import KvCache
from loraplex.server.adapter_rows import Assignment, direct_adapter
from loraplex.server.request import Sequence as TokenSequence
from loraplex.server.step_plan import Chunk

Sequences = tuple[TokenSequence, ...]

Int32Array = npt.NDArray[np.int32]

NO_UNIT = -1


_FIRST_PAGES = 64
"""Of a sequence, that there is room for at first."""


@dataclass(slots=True)
class _Lane:
    """Where a sequence is kept, and what was looked up for it: its page list, and its prompt's tokens."""

    index: int
    page_list: list[int] | None = None
    assignment: Assignment = ()
    prompt: Int32Array | None = None


class Lanes:
    """Rows of arrays, one for each sequence that runs.

    Args:
        kv: page lists of sequences.
        table: that has the adapters' units.
        capacity: sequences of a step at most.
        max_pages: pages of a sequence at most.

    Attributes:
        pages: [lanes, as many as any sequence has] int32, so that the rows of a step lie close together.
        units: [lanes] int64, the unit of a sequence's one adapter; ``NO_UNIT`` without one or with a mix.
        acts_from: [lanes] int64, the first position at which its adapters act.
        is_special: [lanes] bool, whether its rows need more than that unit: a mix, or an adapter with routers.
        reads_tokens: [lanes] bool, whether an adapter chooses experts by the ids of tokens.
        version: rises whenever a lane gets other adapters.
        sampled_at: [lanes] int64, the launch that sampled its newest token,
        sampled_row: [lanes] int64, the place of that token among those of the launch, and
        sampled_position: [lanes] int64, its position.
    """

    def __init__(self, kv: KvCache, table: AdapterTable, capacity: int, max_pages: int) -> None:
        self._kv = kv
        self._max_pages = max_pages
        self._page_tokens = kv.page_tokens
        self._table = table
        size = 2 * capacity  # so that lanes of sequences that have left are given up only now and then
        self.pages = np.zeros((size, min(max_pages, _FIRST_PAGES)), dtype=np.int32)
        self.num_pages = np.zeros(size, dtype=np.int64)
        self.units = np.full(size, NO_UNIT, dtype=np.int64)
        self.acts_from = np.zeros(size, dtype=np.int64)
        self.is_special = np.zeros(size, dtype=np.bool_)
        self.reads_tokens = np.zeros(size, dtype=np.bool_)
        self.version = 0
        self.sampled_at = np.full(size, -1, dtype=np.int64)
        self.sampled_row = np.zeros(size, dtype=np.int64)
        self.sampled_position = np.zeros(size, dtype=np.int64)
        self._lanes: dict[int, _Lane] = {}
        self._free = list(range(size))[::-1]
        self._last_sequences: Sequences = ()
        self._last: Int64Array = np.zeros(0, dtype=np.int64)

    def of(
        self, chunks: Sequence[Chunk], sequences: Sequences, stops: Int64Array, resident: Mapping[str, ResidentAdapter]
    ) -> Int64Array:
        """[n] the lane of each chunk's sequence, with its pages for tokens up to ``stops [n]`` and its adapters."""
        if sequences != self._last_sequences:
            here = {sequence.seq_id for sequence in sequences}
            self._last = np.array([self._find(chunk, here, resident) for chunk in chunks], dtype=np.int64)
            self._last_sequences = sequences
        self.read_new_pages(sequences, self._last, stops)
        return self._last

    def read_new_pages(self, sequences: Sequence[TokenSequence], lanes: Int64Array, stops: Int64Array) -> None:
        """Bring the page lists of lanes up to date for tokens up to ``stops [n]``."""
        for seq_id in self._kv.take_replaced():
            if seq_id in self._lanes:
                self._read_pages(self._lanes[seq_id], seq_id, 0)
        for place in np.flatnonzero(self.num_pages[lanes] * self._page_tokens < stops).tolist():
            lane = self._lanes[sequences[place].seq_id]
            self._read_pages(lane, sequences[place].seq_id, int(self.num_pages[lane.index]))

    def assignment(self, chunk: Chunk) -> Assignment:
        """The adapters of a chunk's sequence."""
        return self._lanes[chunk.sequence.seq_id].assignment

    def is_listed(self, chunk: Chunk) -> bool:
        """Whether its adapters' own pairs are not those of ``units``: a mix, or a token-wise adapter."""
        return bool(self.units[self._lanes[chunk.sequence.seq_id].index] == NO_UNIT)

    def tokens(self, chunk: Chunk) -> Int32Array:
        """[stop - start] tokens of a chunk, all of which the host knows."""
        lane = self._lanes[chunk.sequence.seq_id]
        if chunk.stop > len(chunk.sequence.prompt_ids):
            return np.array(chunk.sequence.token_slice(chunk.start, chunk.stop), dtype=np.int32)
        if lane.prompt is None:
            lane.prompt = np.array(chunk.sequence.prompt_ids, dtype=np.int32)
        found: Int32Array = lane.prompt[chunk.start : chunk.stop]
        return found

    def note_samples(self, lanes: Int64Array, positions: Int64Array, launch: int) -> None:
        """The launch samples the tokens at ``positions`` of these lanes, in this order."""
        self.sampled_at[lanes] = launch
        self.sampled_row[lanes] = np.arange(len(lanes))
        self.sampled_position[lanes] = positions

    def forget_all(self) -> None:
        """Look everything up again: units or pages mean something else now."""
        self._free += [lane.index for lane in self._lanes.values()]
        self._lanes.clear()
        self._last_sequences = ()
        self.version += 1

    def _find(self, chunk: Chunk, here: set[int], resident: Mapping[str, ResidentAdapter]) -> int:
        sequence = chunk.sequence
        lane = self._lanes.get(sequence.seq_id)
        if lane is None:
            if not self._free:
                self._prune(here)
            lane = self._lanes[sequence.seq_id] = _Lane(self._free.pop())
            self.sampled_at[lane.index] = -1
        if lane.page_list is not self._kv.pages(sequence.seq_id):
            # New here, or back after a preemption: its adapters may have been paged in anew.
            self._read_pages(lane, sequence.seq_id, 0)
            self._read_adapters(lane, chunk, resident)
        return lane.index

    def _prune(self, kept: set[int]) -> None:
        for seq_id in [seq_id for seq_id in self._lanes if seq_id not in kept]:
            self._free.append(self._lanes.pop(seq_id).index)

    def _read_pages(self, lane: _Lane, seq_id: int, first: int) -> None:
        lane.page_list = pages = self._kv.pages(seq_id)
        if len(pages) > self.pages.shape[1]:
            self._widen(len(pages))
        self.pages[lane.index, first : len(pages)] = pages[first:]
        self.num_pages[lane.index] = len(pages)

    def _widen(self, num_pages: int) -> None:
        width = min(self._max_pages, 1 << (num_pages - 1).bit_length())
        self.pages = np.pad(self.pages, ((0, 0), (0, width - self.pages.shape[1])))

    def _read_adapters(self, lane: _Lane, chunk: Chunk, resident: Mapping[str, ResidentAdapter]) -> None:
        self.version += 1
        lane.assignment = tuple((resident[identity], weight) for identity, weight in chunk.adapters)
        direct = direct_adapter(lane.assignment)
        self.units[lane.index] = NO_UNIT if direct is None else self._table.unit_of(direct)
        self.acts_from[lane.index] = chunk.adapter_start
        is_routed = direct is not None and direct.routing is not None
        self.is_special[lane.index] = bool(lane.assignment) and (direct is None or is_routed)
        self.reads_tokens[lane.index] = any(adapter.token_routes is not None for adapter, _ in lane.assignment)
