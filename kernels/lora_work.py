"""What a step has to do at one group of sites, as tensors: the plans that ``lora.py`` carries out.

An *entry* is one unit of low-rank work for one row: an adapter's pairs, or one expert's, times a weight. A row without
an adapter has no entry, a LoRA row one, a mixture's row one for each expert that it is routed to, a row under a mix one
for each adapter. Which kind of adapter an entry came from is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from loraplex.kernels.lora_rows import GroupRows, SiteGroup


@dataclass(frozen=True, slots=True)
class RowMap:
    """The rows that consecutive entries read or write: ``[start, stop)``, or those of ``index [n]`` int64."""

    start: int
    stop: int
    index: torch.Tensor | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Those rows of ``x``: a view where they stand together."""
        return x[self.start : self.stop] if self.index is None else x.index_select(0, self.index)

    def part(self, start: int, stop: int) -> RowMap:
        """Those of the entries from ``start`` to before ``stop``."""
        index = None if self.index is None else self.index[start:stop]
        return RowMap(self.start + start, self.start + stop, index)

    def add(self, y: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``delta [n, width]`` to those rows of ``y``; rows that come up more than once get all of theirs."""
        if self.index is None:
            y[self.start : self.stop] += delta
        else:
            y.index_add_(0, self.index, delta.to(y.dtype))


@dataclass(frozen=True, slots=True)
class RowSums:
    """Adds up the entries of each row.

    Attributes:
        rows: [m] int64, distinct rows.
        order: [n] int64, the entries row by row.
        starts: [m] int64, where each row's share of ``order`` begins.
        weights: [n] float32 in that order; None where all are 1.
    """

    rows: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor | None

    def of(self, deltas: torch.Tensor) -> torch.Tensor:
        """[n, width] of entries to [m, width] of rows, weighed."""
        weights = None if self.weights is None else self.weights.to(deltas.dtype)
        return F.embedding_bag(self.order, deltas, self.starts, mode="sum", per_sample_weights=weights)


@dataclass(frozen=True, slots=True)
class GainRows:
    """DoRA's gains less one: chunk ``ids [m]`` int64 go to the output chunks ``bags [m]`` int64 of the entries."""

    ids: torch.Tensor
    bags: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpandRows:
    """The second half of gathered work: which rows of B, weighed by what, each output chunk sums.

    Attributes:
        to: rows of the step that the entries add to.
        scales: [n] float32, one per row of the low-rank intermediate; an entry's weight is in it.
        b_ids: [m] int64 chunk ids of B.
        b_rows: [m] int64 row of the intermediate that weighs each.
        bag_starts: [entries * out_chunks] int64, where each output chunk's share of ``b_ids`` begins.
    """

    to: RowMap
    scales: torch.Tensor
    b_ids: torch.Tensor
    b_rows: torch.Tensor
    bag_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """The work of all entries whose unit has few of them.

    Attributes:
        rows: of the input.
        a_ids: [n, in_chunks] int64 chunk ids of A, one line per row of the low-rank intermediate.
        x_ids: [n, in_chunks] int64, for each of them the chunk of the entries' input to multiply with.
        weights: [entries, 1] float32, or None where all are 1.
    """

    rows: RowMap
    a_ids: torch.Tensor
    x_ids: torch.Tensor
    output: ExpandRows
    gains: GainRows | None
    weights: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """The work of all entries at the embedding: ``element_ids [n]`` int64 are A's elements at the rows' tokens.

    ``weights`` are [entries, 1] float32, or None where all are 1.
    """

    group: SiteGroup
    element_ids: torch.Tensor
    output: ExpandRows
    gains: GainRows | None
    weights: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """The entries [start, stop) of one unit that has many.

    Ids are tensors only where the adapter's pages do not lie in one run. ``gains`` are those of a single entry.
    """

    start: int
    stop: int
    source: RowMap
    to: RowMap
    rows: GroupRows
    a_ids: torch.Tensor | None
    b_ids: tuple[torch.Tensor, ...] | None
    gains: GainRows | None
    weights: torch.Tensor | None

    def part(self, start: int, stop: int) -> SegmentRows:
        """Some of the entries, which add to the first rows of what they are given."""
        weights = None if self.weights is None else self.weights[start:stop]
        to = RowMap(0, stop - start)
        return replace(self, start=0, stop=stop - start, source=self.source.part(start, stop), to=to, weights=weights)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """All low-rank work of a step at a group of sites.

    ``sums`` says how the entries from ``first_long`` on, those of segments, add up to rows; None where each segment
    adds to rows that stand together.
    """

    group: SiteGroup
    gathered: GatheredRows | None
    segments: tuple[SegmentRows, ...]
    sums: RowSums | None = None
    first_long: int = 0

    @property
    def has_gains(self) -> bool:
        return any(part is not None and part.gains is not None for part in (self.gathered, *self.segments))
