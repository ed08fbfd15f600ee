"""Makes the tensors of a step from the scheduler's plan.

Rows are arranged so that those of one adapter stand together: rows without a single adapter first, then adapters with
few rows, then those with many (see ``kernels/lora_plan.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from loraplex.kernels.attention_plan import AttentionPlanner, SequenceSpan
from loraplex.kernels.lora_plan import SHORT_SEGMENT_ROWS, Segment
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter, SiteGroup
from loraplex.kernels.step_adapters import RouteLog, StepAdapters
from loraplex.memory.kv_cache import KvCache
from loraplex.server.adapter_rows import AdapterRows, Assignment, PlacedRows, direct_adapter
from loraplex.server.decoder import DecoderInput
from loraplex.server.step_plan import Chunk

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LogitRow:
    """A row whose logits are wanted: of ``chunk``, at ``position`` in its sequence."""

    chunk: Chunk
    position: int
    row: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` to ``stop - 1`` of a chunk, which all have the same adapters; an activated LoRA cuts in two."""

    chunk: Chunk
    assignment: Assignment
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input, and which logits it will yield, in their order.

    Attributes:
        pieces: with the row that each begins at.
        log: the experts that routers choose, where anybody asks; filled by the forward pass.
    """

    step: DecoderInput
    logit_rows: list[LogitRow]
    pieces: list[tuple[int, Piece]]
    log: RouteLog | None


@dataclass(frozen=True, slots=True)
class _Arranged(Generic[T]):
    """Items with their assignments and the rows they begin at; direct segments; and the rows that have adapters."""

    items: list[tuple[int, T]]
    segments: list[Segment]
    placed: list[PlacedRows]


class BatchMaker:
    """Makes batches. Adapter batches are kept from step to step while the rows keep their adapters.

    Args:
        planner: plans attention.
        kv: page lists of sequences.
        embedding_group: the embedding as a site.
        device: where tensors go.
        logs_routes: whether every step's choices of experts are noted, and not only those that a request asks for.
    """

    def __init__(
        self,
        planner: AttentionPlanner,
        kv: KvCache,
        embedding_group: SiteGroup,
        device: torch.device,
        *,
        logs_routes: bool = False,
    ) -> None:
        self._planner = planner
        self._kv = kv
        self._embedding_group = embedding_group
        self._device = device
        self._logs_routes = logs_routes
        self._rows = AdapterRows(device)
        self._logit_rows = AdapterRows(device)

    def make(self, chunks: Sequence[Chunk], resident: Mapping[str, ResidentAdapter]) -> Batch:
        """The tensors of a step over ``chunks``, whose adapters are in ``resident`` by identity."""
        arranged = _arrange(
            (piece.assignment, piece, piece.stop - piece.start) for chunk in chunks for piece in _cut(chunk, resident)
        )
        spans: list[SequenceSpan] = []
        wanted: list[tuple[Assignment, LogitRow, int]] = []
        tokens: list[int] = []
        for row, piece in arranged.items:
            sequence = piece.chunk.sequence
            tokens += sequence.token_slice(piece.start, piece.stop)
            spans.append(SequenceSpan(row, piece.start, piece.stop, self._kv.pages(sequence.seq_id)))
            wanted += [(piece.assignment, want, 1) for want in wanted_logits(piece, row)]
        logits = _arrange(wanted)
        token_array = np.array(tokens, dtype=np.int64)
        log = RouteLog() if self._logs_routes or any(chunk.wants_routing for chunk in chunks) else None
        adapters = self._rows.make(arranged.segments, arranged.placed, token_array, log)
        logit_rows = np.array([want.row for _, want in logits.items], dtype=np.int64)
        step = DecoderInput(
            tokens=torch.from_numpy(token_array).to(self._device, non_blocking=True),
            attention=self._planner.plan(spans),
            adapters=self._with_embedding(adapters, token_array),
            logit_rows=torch.from_numpy(logit_rows).to(self._device, non_blocking=True),
            logit_adapters=self._logit_rows.make(logits.segments, logits.placed, token_array[logit_rows], routes=False),
        )
        return Batch(step, [want for _, want in logits.items], arranged.items, log)

    def _with_embedding(self, adapters: StepAdapters | None, tokens: Int64Array) -> StepAdapters | None:
        if adapters is None:
            return None
        batches = [batch for batch in (adapters.direct, adapters.listed) if batch is not None]
        plans = [batch.embedding_plan(self._embedding_group, tokens) for batch in batches]
        return replace(adapters, embedding=tuple(plan for plan in plans if plan is not None))


def _cut(chunk: Chunk, resident: Mapping[str, ResidentAdapter]) -> Iterator[Piece]:
    """The tokens before the adapters act, which are the base model's, and those from there on."""
    acts_from = min(max(chunk.adapter_start, chunk.start), chunk.stop) if chunk.adapters else chunk.stop
    if chunk.start < acts_from:
        yield Piece(chunk, (), chunk.start, acts_from)
    if acts_from < chunk.stop:
        assignment = tuple([(resident[identity], weight) for identity, weight in chunk.adapters])
        yield Piece(chunk, assignment, acts_from, chunk.stop)


def wanted_logits(piece: Piece, row: int) -> list[LogitRow]:
    """The rows of a piece, whose first is ``row``, whose logits are wanted."""
    chunk = piece.chunk
    positions = list(range(piece.start, min(piece.stop, len(chunk.sequence.prompt_ids) - 1)))
    if not chunk.wants_prompt_logprobs:
        positions = []
    if chunk.samples and piece.stop == chunk.stop:
        positions.append(chunk.stop - 1)
    return [LogitRow(chunk, position, row + position - piece.start) for position in positions]


def _arrange(items: Iterable[tuple[Assignment, T, int]]) -> _Arranged[T]:
    """Sort items, each with an assignment and a number of rows: without a direct adapter, short segments, long ones."""
    loose: list[tuple[Assignment, T, int]] = []
    by_adapter: dict[int, tuple[ResidentAdapter, list[tuple[Assignment, T, int]]]] = {}
    for item in items:
        adapter = direct_adapter(item[0])
        if adapter is None:
            loose.append(item)
        else:
            by_adapter.setdefault(id(adapter), (adapter, []))[1].append(item)
    arranged: _Arranged[T] = _Arranged([], [], [])
    start = _place(arranged, loose, 0)
    for adapter, members in sorted(by_adapter.values(), key=lambda g: _num_rows(g[1]) > SHORT_SEGMENT_ROWS):
        stop = _place(arranged, members, start)
        arranged.segments.append(Segment(adapter, start, stop))
        start = stop
    return arranged


def _place(arranged: _Arranged[T], items: list[tuple[Assignment, T, int]], start: int) -> int:
    for assignment, item, rows in items:
        arranged.items.append((start, item))
        if assignment:
            arranged.placed.append(PlacedRows(assignment, start, start + rows))
        start += rows
    return start


def _num_rows(items: list[tuple[Assignment, T, int]]) -> int:
    return sum(rows for _, _, rows in items)
