"""How the low-rank work of one step is grouped, for each group of sites.

A step's rows are sorted so that rows of one adapter stand together: first the base-only rows, then the segments. A
short segment (decoding: one row or two per adapter) would waste a matrix product on each adapter, so all short segments
go through one shrink and one expand that gather the rows they need, whatever their ranks. A long segment (a prefill
chunk) is two matrix products over the adapter's matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from loraplex.kernels.lora_rows import CHUNK, GroupRows, Int64Array, ResidentAdapter, SiteGroup

SHORT_SEGMENT_ROWS = 2
"""Segments of at most this many rows are gathered together."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows [start, stop) of a step that one adapter applies to."""

    adapter: ResidentAdapter
    start: int
    stop: int

    @property
    def is_short(self) -> bool:
        return self.stop - self.start <= SHORT_SEGMENT_ROWS


@dataclass(frozen=True, slots=True)
class ExpandRows:
    """The second half of gathered work: which rows of B, weighed by what, each output chunk sums.

    Attributes:
        start, stop: rows of the step that this covers.
        scales: [n] float32, one per row of the low-rank intermediate.
        b_ids: [m] int64 chunk ids of B.
        b_rows: [m] int64 row of the intermediate that weighs each.
        bag_starts: [(stop - start) * out_chunks] int64, where each output chunk's share of ``b_ids`` begins.
    """

    start: int
    stop: int
    scales: torch.Tensor
    b_ids: torch.Tensor
    b_rows: torch.Tensor
    bag_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """The work of all short segments at a group of sites.

    Attributes:
        a_ids: [n, in_chunks] int64 chunk ids of A, one line per row of the low-rank intermediate.
        x_ids: [n, in_chunks] int64, for each of them the chunk of the input to multiply with.
    """

    a_ids: torch.Tensor
    x_ids: torch.Tensor
    output: ExpandRows


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """The work of all segments at the embedding: ``element_ids [n]`` int64 are A's elements at the rows' tokens."""

    group: SiteGroup
    element_ids: torch.Tensor
    output: ExpandRows


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """One long segment at a group of sites; ids are tensors only where the adapter's pages do not lie in one run."""

    start: int
    stop: int
    rows: GroupRows
    a_ids: torch.Tensor | None
    b_ids: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """All low-rank work of a step at a group of sites."""

    group: SiteGroup
    gathered: GatheredRows | None
    segments: tuple[SegmentRows, ...]


@dataclass(eq=False, slots=True)
class AdapterBatch:
    """The adapters of one step. Plans are made on first use and shared by all layers that look alike.

    Args:
        segments: the rows that have an adapter, in row order, short segments first and standing together.
        device: where the index tensors go.
    """

    segments: Sequence[Segment]
    device: torch.device
    _plans: dict[tuple[object, ...], GroupPlan | None] = field(default_factory=dict)

    def layer_plan(self, layer: int, group: SiteGroup) -> GroupPlan | None:
        """The work at a group of a layer; None where no adapter of the batch has any."""
        classes = tuple(segment.adapter.layout.layout_of_layer[layer] for segment in self.segments)
        return self._plan((group.sites, classes), group, lambda adapter: adapter.layer_rows(layer, group))

    def model_plan(self, group: SiteGroup) -> GroupPlan | None:
        """The work at a group of model sites."""
        return self._plan((group.sites,), group, lambda adapter: adapter.model_rows(group))

    def embedding_plan(self, group: SiteGroup, tokens: Int64Array) -> EmbeddingRows | None:
        """The work at the embedding, for the token of each row of the step."""
        found = [(segment, segment.adapter.model_rows(group)) for segment in self.segments]
        columns = [
            rows.a_ids[:, tokens[segment.start : segment.stop] // CHUNK].T.ravel() * CHUNK
            + np.repeat(tokens[segment.start : segment.stop] % CHUNK, rows.num_rows)
            for segment, rows in found
            if rows is not None
        ]
        if not columns:
            return None
        return EmbeddingRows(
            group, _to(np.concatenate(columns), self.device), _gather_output(group, found, self.device)
        )

    def _plan(
        self, key: tuple[object, ...], group: SiteGroup, rows_of: Callable[[ResidentAdapter], GroupRows | None]
    ) -> GroupPlan | None:
        if key not in self._plans:
            self._plans[key] = self._make_plan(group, rows_of)
        return self._plans[key]

    def _make_plan(self, group: SiteGroup, rows_of: Callable[[ResidentAdapter], GroupRows | None]) -> GroupPlan | None:
        found = [(segment, rows_of(segment.adapter)) for segment in self.segments]
        short = [(segment, rows) for segment, rows in found if segment.is_short]
        long = [(segment, rows) for segment, rows in found if rows is not None and not segment.is_short]
        gathered = _gather(group, short, self.device) if any(rows is not None for _, rows in short) else None
        if gathered is None and not long:
            return None
        return GroupPlan(group, gathered, tuple(_segment_rows(s, rows, self.device) for s, rows in long))


Found = Sequence[tuple[Segment, GroupRows | None]]
"""Neighbouring segments, each with what its adapter has at the group in hand."""


def _gather(group: SiteGroup, found: Found, device: torch.device) -> GatheredRows:
    first = found[0][0].start
    in_chunk = np.arange(group.in_chunks, dtype=np.int64)
    a_ids: list[Int64Array] = []
    x_ids: list[Int64Array] = []
    for segment, rows in found:
        if rows is None:
            continue
        for row in range(segment.start - first, segment.stop - first):
            a_ids.append(rows.a_ids)
            x_ids.append(np.broadcast_to(row * group.in_chunks + in_chunk, rows.a_ids.shape))
    output = _gather_output(group, found, device)
    return GatheredRows(_to(np.concatenate(a_ids), device), _to(np.concatenate(x_ids), device), output)


def _gather_output(group: SiteGroup, found: Found, device: torch.device) -> ExpandRows:
    no_bags = np.zeros(sum(group.out_chunks), dtype=np.int64)
    scales, b_ids, b_rows, bag_sizes = [], [], [], []
    made = 0
    for segment, rows in found:
        count = segment.stop - segment.start
        bag_sizes += [no_bags if rows is None else rows.bag_sizes] * count
        if rows is None:
            continue
        scales += [rows.scales] * count
        b_ids += [rows.expand_ids] * count
        b_rows += [rows.expand_rows + made + i * rows.num_rows for i in range(count)]
        made += count * rows.num_rows
    sizes = np.concatenate(bag_sizes)
    return ExpandRows(
        found[0][0].start,
        found[-1][0].stop,
        torch.from_numpy(np.concatenate(scales)).to(device),
        _to(np.concatenate(b_ids), device),
        _to(np.concatenate(b_rows), device),
        _to(np.cumsum(sizes) - sizes, device),
    )


def _segment_rows(segment: Segment, rows: GroupRows, device: torch.device) -> SegmentRows:
    if rows.contiguous:
        return SegmentRows(segment.start, segment.stop, rows, None, None)
    b_ids = tuple(_to(part.b_ids.ravel(), device) for part in rows.parts)
    return SegmentRows(segment.start, segment.stop, rows, _to(rows.a_ids.ravel(), device), b_ids)


def _to(array: Int64Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
