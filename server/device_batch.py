"""A step's arrays for the kernels of a GPU: what the host tells the device, in numpy and without lists over tokens.

Rows that decode stand first, in the order of the scheduler, then the chunks of prompts. They are not sorted by adapter:
the kernels go by *entries* (see ``kernels/lora_tiles.py``). A row's token is either known here, or the one that the
last launch sampled for its sequence, which is taken on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.kernels.paged_decode import count_splits, list_decode_tiles
from loraplex.kernels.paged_prefill import prefill_tiles
from loraplex.kernels.step_adapters import RouteLog
from loraplex.memory.kv_cache import KvCache
from loraplex.server.batch import LogitRow, Piece, wanted_logits
from loraplex.server.device_entries import EntryMaker, Span, StepEntries
from loraplex.server.lanes import Lanes
from loraplex.server.request import Sequence as TokenSequence
from loraplex.server.step_plan import Chunk

PROMPT_BLOCK_ROWS = 64
"""Entries of a tile at most in steps with prompts: many rows of an adapter are several blocks, which run at once."""

Array = npt.NDArray[Any]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A step, as the host describes it. Chunks are in the order of their rows.

    Attributes:
        chunks: those that decode, then those of prompts.
        num_decodes: chunks, and rows, that decode.
        arrays: by name: tokens, sources, positions, slots [rows] int32; lengths [num_decodes] int32 and for each window
            ``tiles_<w>``, ``tile_starts_<w>``; of prompts row_starts, prompt_lengths, prefill_tiles; logit_rows [n].
        pages: [chunks, pages] int32.
        entries: the adapters' work on the rows.
        logit_rows: what is wanted of each logit row; None where each chunk samples at its last row and nowhere else.
        logit_entries: the adapters' work on the logit rows; None where those are all rows, in order.
        pieces: of chunks, with their first rows, where choices of experts are noted in ``log``.
        only_samples: whether no logits are wanted but those of samples.
    """

    chunks: Sequence[Chunk]
    num_decodes: int
    arrays: dict[str, Array]
    pages: Int32Array
    entries: StepEntries
    logit_rows: list[LogitRow] | None
    logit_entries: StepEntries | None
    pieces: list[tuple[int, Piece]]
    log: RouteLog | None
    only_samples: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def num_logits(self) -> int:
        return self.num_rows if self.logit_entries is None else len(self.arrays["logit_rows"])

    @property
    def only_decodes(self) -> bool:
        """Whether every row decodes and samples, and nothing else is wanted of it."""
        return self.logit_entries is None


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A step in which every sequence decoded and nothing else was wanted, so that the next one is as good as known."""

    sequences: list[TokenSequence]
    lanes: Int64Array
    starts: Int64Array
    tokens: Int32Array
    sources: Int32Array
    entries: StepEntries


class DeviceBatchMaker:
    """Makes the batches of a device.

    Args:
        kv: page lists of sequences.
        table: of the adapters in the pool.
        windows: the distinct attention windows of the model's layers.
        max_sequences: of a step at most.
        max_pages: of a sequence at most.
        prompt_tile: new tokens of one tile of attention, ``paged_prefill.tile_queries``.
        logs_routes: whether every step's choices of experts are noted, and not only those that a request asks for.
    """

    def __init__(
        self,
        kv: KvCache,
        table: AdapterTable,
        windows: Sequence[int | None],
        *,
        max_sequences: int,
        max_pages: int,
        prompt_tile: int,
        logs_routes: bool = False,
    ) -> None:
        self._page_tokens = kv.page_tokens
        self._windows = windows
        self._prompt_tile = prompt_tile
        self._logs_routes = logs_routes
        self._launches = 0
        self._decoding: _Decoding | None = None
        self._splits: dict[int | None, tuple[Int32Array, Int32Array, Int32Array]] = {}
        self._lanes = Lanes(kv, table, max_sequences, max_pages)
        self._entries = EntryMaker(table, self._lanes)
        self._logit_entries = EntryMaker(table, self._lanes)

    def forget_all(self) -> None:
        """After a failure: what was looked up is looked up again."""
        self._lanes.forget_all()
        self._decoding = None

    def make(self, chunks: Sequence[Chunk], resident: Mapping[str, ResidentAdapter]) -> DeviceBatch:
        """The arrays of a step over ``chunks``, whose adapters are in ``resident`` by identity.

        Each call is a launch: the next one may take the tokens that this one samples from the device.
        """
        last, self._decoding = self._decoding, None
        if last is not None and [chunk[0] for chunk in chunks] == last.sequences:
            return self._go_on(chunks, last)
        ordered, columns = chunks, tuple(zip(*chunks))
        starts, stops = _integers(columns[1]), _integers(columns[2])
        rows = stops - starts
        num_decodes = int(np.count_nonzero(rows == 1))
        if num_decodes < len(rows):
            order = np.argsort(rows != 1, kind="stable")
            ordered = [chunks[place] for place in order.tolist()]
            starts, stops, rows, columns = starts[order], stops[order], rows[order], tuple(zip(*ordered))
        sequences, _, _, samples, _, _, prompt_logprobs, routings, _ = columns
        lanes = self._lanes.of(ordered, sequences, stops, resident)
        if num_decodes == len(rows):
            first_rows, positions, lane_of_row = _count_to(len(rows)), starts, lanes
        else:
            first_rows = np.cumsum(rows) - rows
            positions = np.repeat(starts - first_rows, rows) + _count_to(int(rows.sum()))
            lane_of_row = np.repeat(lanes, rows)
        page, place = np.divmod(positions, self._page_tokens)
        pages = self._lanes.pages[lanes, : int(stops.max() - 1) // self._page_tokens + 1]
        arrays: dict[str, Array] = {
            "positions": positions.astype(np.int32),
            "slots": (self._lanes.pages[lane_of_row, page] * (2 * self._page_tokens) + place).astype(np.int32),
        }
        self._add_tokens(arrays, ordered, lanes, starts, num_decodes, len(positions))
        self._plan_attention(arrays, stops, rows, num_decodes)
        log = RouteLog() if self._logs_routes or any(routings) else None
        special = self._special(ordered, lanes, first_rows, rows)
        tile = None if num_decodes == len(rows) else PROMPT_BLOCK_ROWS
        entries = self._entries.make(lane_of_row, positions, special, log, block_rows=tile)
        pieces = [] if log is None else self._pieces(ordered, first_rows)
        logit_rows, logit_entries = None, None
        if num_decodes < len(rows) or not all(samples) or any(prompt_logprobs):
            logit_rows, logit_entries = self._plan_logits(arrays, ordered, lanes, first_rows)
        elif log is None and self._entries.keeps_all:
            no_tokens, sources = np.zeros(len(rows), dtype=np.int32), np.arange(len(rows), dtype=np.int32)
            self._decoding = _Decoding(list(sequences), lanes, starts, no_tokens, sources, entries)
        self._launches += 1
        if not all(samples):
            sampling = np.flatnonzero(samples)
            lanes, stops = lanes[sampling], stops[sampling]
        self._lanes.note_samples(lanes, stops, self._launches)
        return DeviceBatch(
            ordered,
            num_decodes,
            arrays,
            pages,
            entries,
            logit_rows,
            logit_entries,
            pieces,
            log,
            not any(prompt_logprobs),
        )

    def _go_on(self, chunks: Sequence[Chunk], last: _Decoding) -> DeviceBatch:
        """The next token of each sequence of the last step, which sampled it."""
        starts = last.starts + 1
        assert (chunks[0].start, chunks[-1].stop) == (starts[0], starts[-1] + 1), (
            "a sequence has not gone on by one token"
        )
        stops, lanes = starts + 1, last.lanes
        self._lanes.read_new_pages(last.sequences, lanes, stops)
        page, place = np.divmod(starts, self._page_tokens)
        arrays: dict[str, Array] = {
            "positions": starts.astype(np.int32),
            "slots": (self._lanes.pages[lanes, page] * (2 * self._page_tokens) + place).astype(np.int32),
            "tokens": last.tokens,
            "sources": last.sources,
        }
        self._plan_attention(arrays, stops, stops - starts, len(starts))
        pages = self._lanes.pages[lanes, : int(page.max()) + 1]
        self._launches += 1
        self._lanes.note_samples(lanes, stops, self._launches)
        self._decoding = replace(last, starts=starts)
        return DeviceBatch(chunks, len(starts), arrays, pages, last.entries, None, None, [], None)

    def _add_tokens(
        self,
        arrays: dict[str, Array],
        chunks: Sequence[Chunk],
        lanes: Int64Array,
        starts: Int64Array,
        num_decodes: int,
        num_rows: int,
    ) -> None:
        """``tokens``, and ``sources``: the place of the row's token among the last launch's samples, or -1."""
        kept, own = self._lanes, lanes[:num_decodes]
        tokens = np.zeros(num_rows, dtype=np.int32)
        sources = np.full(num_rows, -1, dtype=np.int32)
        sampled = (kept.sampled_at[own] == self._launches) & (kept.sampled_position[own] == starts[:num_decodes])
        if sampled.all():
            sources[:num_decodes] = kept.sampled_row[own]
        else:
            sources[:num_decodes] = np.where(sampled, kept.sampled_row[own], -1)
            for row in np.flatnonzero(~sampled).tolist():
                tokens[row] = chunks[row].sequence.token_slice(chunks[row].start, chunks[row].stop)[0]
        at = num_decodes
        for chunk in chunks[num_decodes:]:
            stop = at + chunk.stop - chunk.start
            tokens[at:stop] = self._lanes.tokens(chunk)
            at = stop
        arrays["tokens"], arrays["sources"] = tokens, sources

    def _plan_attention(self, arrays: dict[str, Array], stops: Int64Array, rows: Int64Array, num_decodes: int) -> None:
        lengths = stops[:num_decodes].astype(np.int32)
        arrays["lengths"] = lengths
        for window in self._windows:
            splits = count_splits(lengths, window or 0)
            last = self._splits.get(window)
            if last is None or not np.array_equal(last[0], splits):
                self._splits[window] = last = (splits, *list_decode_tiles(splits))
            _, arrays[f"tiles_{window}"], arrays[f"tile_starts_{window}"] = last
        if num_decodes < len(stops):
            row_starts = np.zeros(len(stops) - num_decodes + 1, dtype=np.int32)
            np.cumsum(rows[num_decodes:], out=row_starts[1:])
            prompt_lengths = stops[num_decodes:].astype(np.int32)
            arrays["row_starts"], arrays["prompt_lengths"] = row_starts + np.int32(num_decodes), prompt_lengths
            arrays["prefill_tiles"] = prefill_tiles(row_starts, prompt_lengths, self._prompt_tile)

    def _special(
        self, chunks: Sequence[Chunk], lanes: Int64Array, first_rows: Int64Array, rows: Int64Array
    ) -> Iterator[Span]:
        for place in np.flatnonzero(self._lanes.is_special[lanes]).tolist():
            first = int(first_rows[place])
            yield chunks[place], first, first + int(rows[place])

    def _pieces(self, chunks: Sequence[Chunk], first_rows: Int64Array) -> list[tuple[int, Piece]]:
        """The part of each chunk on which its adapters act."""
        pieces = []
        for chunk, row in zip(chunks, first_rows.tolist()):
            start = min(max(chunk.adapter_start, chunk.start), chunk.stop) if chunk.adapters else chunk.stop
            assignment = self._lanes.assignment(chunk)
            if start < chunk.stop:
                pieces.append((row + start - chunk.start, Piece(chunk, assignment, start, chunk.stop)))
        return pieces

    def _plan_logits(
        self, arrays: dict[str, Array], chunks: Sequence[Chunk], lanes: Int64Array, first_rows: Int64Array
    ) -> tuple[list[LogitRow], StepEntries]:
        wanted: list[LogitRow] = []
        spans: list[Span] = []
        counts = []
        for chunk, row, is_special in zip(chunks, first_rows.tolist(), self._lanes.is_special[lanes].tolist()):
            found = wanted_logits(Piece(chunk, (), chunk.start, chunk.stop), row)
            if is_special and found:
                spans.append((chunk, len(wanted), len(wanted) + len(found)))
            wanted += found
            counts.append(len(found))
        arrays["logit_rows"] = np.array([want.row for want in wanted], dtype=np.int32)
        positions = np.array([want.position for want in wanted], dtype=np.int64)
        entries = self._logit_entries.make(np.repeat(lanes, counts), positions, spans, routes=False)
        return wanted, entries


def _integers(values: tuple[int, ...]) -> Int64Array:
    return np.fromiter(values, np.int64, len(values))


def _count_to(stop: int) -> Int64Array:
    return np.arange(stop, dtype=np.int64)
