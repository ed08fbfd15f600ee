"""Makes the tensors of a step from the scheduler's plan.

Rows are arranged so that those of one adapter stand together: base-only rows first, then adapters with few rows, then
those with many (see ``kernels/lora_plan.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from loraplex.kernels.attention_plan import AttentionPlanner, SequenceSpan
from loraplex.kernels.lora_plan import SHORT_SEGMENT_ROWS, AdapterBatch, Segment
from loraplex.kernels.lora_rows import ResidentAdapter, SiteGroup
from loraplex.memory.kv_cache import KvCache
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
class Batch:
    """A step's input, and which logits it will yield, in their order."""

    step: DecoderInput
    logit_rows: list[LogitRow]


@dataclass(frozen=True, slots=True)
class _Arranged(Generic[T]):
    items: list[T]
    segments: list[Segment]


class BatchMaker:
    """Makes batches. Adapter batches are kept from step to step while the rows keep their adapters.

    Args:
        planner: plans attention.
        kv: page lists of sequences.
        embedding_group: the embedding as a site.
        device: where tensors go.
    """

    def __init__(
        self, planner: AttentionPlanner, kv: KvCache, embedding_group: SiteGroup, device: torch.device
    ) -> None:
        self._planner = planner
        self._kv = kv
        self._embedding_group = embedding_group
        self._device = device
        self._rows = _Reused(device)
        self._logit_rows = _Reused(device)

    def make(self, chunks: Sequence[Chunk], resident: Mapping[str, ResidentAdapter]) -> Batch:
        """The tensors of a step over ``chunks``, whose adapters are in ``resident`` by identity."""
        arranged = _arrange(
            ((_adapter_of(chunk, resident), chunk, chunk.stop - chunk.start) for chunk in chunks),
        )
        spans: list[SequenceSpan] = []
        wanted: list[LogitRow] = []
        tokens: list[int] = []
        for chunk in arranged.items:
            row = len(tokens)
            tokens += chunk.sequence.token_slice(chunk.start, chunk.stop)
            spans.append(SequenceSpan(row, chunk.start, chunk.stop, self._kv.pages(chunk.sequence.seq_id)))
            wanted += _wanted_logits(chunk, row)
        logits = _arrange((_adapter_of(want.chunk, resident), want, 1) for want in wanted)
        token_array = np.array(tokens, dtype=np.int64)
        adapters = self._rows.batch(arranged.segments)
        step = DecoderInput(
            tokens=torch.from_numpy(token_array).to(self._device, non_blocking=True),
            attention=self._planner.plan(spans),
            adapters=adapters,
            embedding=None if adapters is None else adapters.embedding_plan(self._embedding_group, token_array),
            logit_rows=torch.tensor([want.row for want in logits.items], dtype=torch.int64, device=self._device),
            logit_adapters=self._logit_rows.batch(logits.segments),
        )
        return Batch(step, logits.items)


@dataclass(slots=True)
class _Reused:
    """The last adapter batch, for as long as the segments stay the same."""

    device: torch.device
    _last: AdapterBatch | None = None

    def batch(self, segments: list[Segment]) -> AdapterBatch | None:
        if not segments:
            return None
        if self._last is None or self._last.segments != segments:
            self._last = AdapterBatch(segments, self.device)
        return self._last


def _adapter_of(chunk: Chunk, resident: Mapping[str, ResidentAdapter]) -> ResidentAdapter | None:
    return None if chunk.adapter is None else resident[chunk.adapter]


def _wanted_logits(chunk: Chunk, row: int) -> list[LogitRow]:
    positions = list(range(chunk.start, min(chunk.stop, len(chunk.sequence.prompt_ids) - 1)))
    if not chunk.wants_prompt_logprobs:
        positions = []
    if chunk.samples:
        positions.append(chunk.stop - 1)
    return [LogitRow(chunk, position, row + position - chunk.start) for position in positions]


def _arrange(items: Iterable[tuple[ResidentAdapter | None, T, int]]) -> _Arranged[T]:
    """Sort items, each with an adapter and a number of rows, into base-only ones, short and long segments."""
    base: list[T] = []
    by_adapter: dict[int, tuple[ResidentAdapter, list[T], list[int]]] = {}
    start = 0
    for adapter, item, rows in items:
        if adapter is None:
            base.append(item)
            start += rows
        else:
            group = by_adapter.setdefault(id(adapter), (adapter, [], []))
            group[1].append(item)
            group[2].append(rows)
    segments: list[Segment] = []
    for adapter, members, rows_ in sorted(by_adapter.values(), key=lambda g: sum(g[2]) > SHORT_SEGMENT_ROWS):
        segments.append(Segment(adapter, start, start + sum(rows_)))
        base += members
        start += sum(rows_)
    return _Arranged(base, segments)
