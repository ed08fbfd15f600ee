"""Adds the adapters' low-rank products of a step to the base products: ``y[rows] += scale * (x[rows] A^T) B^T``.

``shrink`` and ``expand`` are the two operators over gathered rows (see ``ops.py``). Long segments use matrix products.
Where an entry has gains, ``(g - 1) * W x`` comes first, of the base product alone (see ``memory/adapter_image.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex.kernels import ops
from loraplex.kernels.device_arrays import stored_rows
from loraplex.kernels.lora_rows import CHUNK, SiteGroup
from loraplex.kernels.lora_work import (
    EmbeddingRows,
    ExpandRows,
    GainRows,
    GatheredRows,
    GroupPlan,
    RowMap,
    SegmentRows,
)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    plan: GroupPlan | None,
    *,
    bias: torch.Tensor | None = None,
    gain_base: torch.Tensor | None = None,
) -> None:
    """Add the work of ``plan`` in place.

    Args:
        y: [rows, sum of the group's out_features], the base products; rows without an adapter are left alone.
        x: [rows, in_features], the group's input, same dtype.
        chunks: [num_chunks, 128], the arena (of one layer for layer sites, whole for model sites), same dtype.
        plan: what to do; None is nothing.
        bias: [sum of out_features] that is in ``y`` and that gains leave alone.
        gain_base: [entries, sum of out_features], the base products, bias included, that the gains of each entry
            multiply; ``y`` itself by default.
    """
    if plan is None:
        return
    if plan.has_gains:
        _add_gains(y, chunks, plan, bias, gain_base)
    if plan.gathered is not None:
        _add_gathered(y, x, chunks, plan.group, plan.gathered)
    if plan.sums is None:
        for segment in plan.segments:
            _add_segment(y[segment.to.start : segment.to.stop], x, chunks, plan.group, segment)
    else:
        y.index_add_(0, plan.sums.rows, plan.sums.of(_segment_deltas(y, x, chunks, plan)))


def add_embedding_lora(y: torch.Tensor, chunks: torch.Tensor, work: EmbeddingRows | None) -> None:
    """Add ``scale * B A[:, token]`` to embeddings in place. The input is one-hot: one element of each row of A is read.

    Gains multiply the base embeddings as they were, as in ``add_lora``.

    Args:
        y: [rows, hidden], the base embeddings.
        chunks: [num_chunks, 128], the whole arena.
        work: what to do; None is nothing.
    """
    if work is None:
        return
    low_rank = chunks.view(-1).index_select(0, work.element_ids).float()
    to, gained = work.output.to, None
    if work.gains is not None:
        gains = _gain_matrix(chunks, work.group, work.gains, to.stop - to.start)
        gained = _gained(to.of(y), None, gains, work.weights)
    _add_expanded(y, low_rank, chunks, work.group, work.output)
    if gained is not None:
        to.add(y, gained)


def _add_gains(
    y: torch.Tensor,
    chunks: torch.Tensor,
    plan: GroupPlan,
    bias: torch.Tensor | None,
    gain_base: torch.Tensor | None,
) -> None:
    # A row under a mix has several entries, and each one's gains multiply the base product as it was.
    terms: list[tuple[RowMap, torch.Tensor]] = []
    gathered = plan.gathered
    if gathered is not None and gathered.gains is not None:
        to = gathered.output.to
        entries = to.stop - to.start
        base = to.of(y) if gain_base is None else gain_base[:entries]
        gains = _gain_matrix(chunks, plan.group, gathered.gains, entries)
        terms.append((to, _gained(base, bias, gains, gathered.weights)))
    for segment in plan.segments:
        if segment.gains is not None:
            base = segment.to.of(y) if gain_base is None else gain_base[segment.start : segment.stop]
            gains = _gain_matrix(chunks, plan.group, segment.gains, 1)
            terms.append((segment.to, _gained(base, bias, gains, segment.weights)))
    for to, term in terms:
        to.add(y, term)


def _gained(
    base: torch.Tensor, bias: torch.Tensor | None, gains: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    term = (base if bias is None else base - bias) * gains
    return term if weights is None else term * weights


def _gain_matrix(chunks: torch.Tensor, group: SiteGroup, gains: GainRows, entries: int) -> torch.Tensor:
    """[entries, sum of out_features]: gains less one, 0 where there are none."""
    padded = chunks.new_zeros((entries * sum(group.out_chunks), CHUNK))
    padded.index_copy_(0, gains.bags, chunks.index_select(0, gains.ids))
    return _trimmed(padded.view(entries, -1), group)


def _add_gathered(y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, work: GatheredRows) -> None:
    low_rank = ops.shrink(_as_chunks(work.rows.of(x), group.in_chunks), chunks, work.a_ids, work.x_ids)
    _add_expanded(y, low_rank, chunks, group, work.output)


def _add_expanded(
    y: torch.Tensor, low_rank: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, work: ExpandRows
) -> None:
    delta = ops.expand(low_rank * work.scales, chunks, work.b_ids, work.b_rows, work.bag_starts)
    work.to.add(y, _trimmed(delta.view(work.to.stop - work.to.start, -1), group))


def _trimmed(padded: torch.Tensor, group: SiteGroup) -> torch.Tensor:
    """[n, padded outputs] without what fills up each output's last chunk."""
    if group.outputs_are_chunked:
        return padded
    parts = padded.split([chunks * CHUNK for chunks in group.out_chunks], dim=1)
    return torch.cat([part[:, :width] for part, width in zip(parts, group.out_features)], dim=1)


def _as_chunks(x: torch.Tensor, in_chunks: int) -> torch.Tensor:
    """[rows, features] as [rows * in_chunks, 128], padded with zeros."""
    padding = in_chunks * CHUNK - x.shape[1]
    return (F.pad(x, (0, padding)) if padding else x).reshape(-1, CHUNK)


def _segment_deltas(y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, plan: GroupPlan) -> torch.Tensor:
    """[entries of the long segments, width]: what each adds, before its weight."""
    assert plan.sums is not None
    deltas = y.new_zeros((len(plan.sums.order), y.shape[1]))
    for segment in plan.segments:
        at = segment.start - plan.first_long
        _add_segment(deltas[at : at + segment.stop - segment.start], x, chunks, plan.group, segment)
    return deltas


def _add_segment(
    y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, segment: SegmentRows
) -> None:
    """Add one segment's work to its rows ``y``."""
    rows = segment.rows
    a = stored_rows(chunks, rows.a_ids, segment.a_ids)[:, : group.in_features]
    low_rank = segment.source.of(x) @ a.T
    for i, part in enumerate(rows.parts):
        width = group.out_features[part.index]
        at = sum(group.out_features[: part.index])
        b = stored_rows(chunks, part.b_ids, None if segment.b_ids is None else segment.b_ids[i])[:, :width]
        y[:, at : at + width].addmm_(low_rank[:, slice(*part.rows)], b, alpha=part.scale)
