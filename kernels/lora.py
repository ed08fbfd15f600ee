"""Adds the adapters' low-rank products of a step to the base products: ``y[rows] += scale * (x[rows] A^T) B^T``.

``shrink`` and ``expand`` are the two operators over gathered rows (see ``ops.py``). Long segments use matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex.kernels import ops
from loraplex.kernels.lora_plan import EmbeddingRows, ExpandRows, GatheredRows, GroupPlan, SegmentRows
from loraplex.kernels.lora_rows import CHUNK, Int64Array, SiteGroup


def add_lora(y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, plan: GroupPlan | None) -> None:
    """Add the work of ``plan`` in place.

    Args:
        y: [rows, sum of the group's out_features], the base products; rows without an adapter are left alone.
        x: [rows, in_features], the group's input, same dtype.
        chunks: [num_chunks, 128], the arena (of one layer for layer sites, whole for model sites), same dtype.
        plan: what to do; None is nothing.
    """
    if plan is None:
        return
    if plan.gathered is not None:
        _add_gathered(y, x, chunks, plan.group, plan.gathered)
    for segment in plan.segments:
        _add_segment(y, x, chunks, plan.group, segment)


def add_embedding_lora(y: torch.Tensor, chunks: torch.Tensor, work: EmbeddingRows | None) -> None:
    """Add ``scale * B A[:, token]`` to embeddings in place. The input is one-hot: one element of each row of A is read.

    Args:
        y: [rows, hidden], the base embeddings.
        chunks: [num_chunks, 128], the whole arena.
        work: what to do; None is nothing.
    """
    if work is not None:
        low_rank = chunks.view(-1).index_select(0, work.element_ids).float()
        _add_expanded(y, low_rank, chunks, work.group, work.output)


def _add_gathered(y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, work: GatheredRows) -> None:
    rows = x[work.output.start : work.output.stop]
    low_rank = ops.shrink(_as_chunks(rows, group.in_chunks), chunks, work.a_ids, work.x_ids)
    _add_expanded(y, low_rank, chunks, group, work.output)


def _add_expanded(
    y: torch.Tensor, low_rank: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, work: ExpandRows
) -> None:
    delta = ops.expand(low_rank * work.scales, chunks, work.b_ids, work.b_rows, work.bag_starts)
    rows = y[work.start : work.stop]
    delta = delta.view(rows.shape[0], -1)
    if group.outputs_are_chunked:
        rows += delta
        return
    y_at = delta_at = 0
    for width, out_chunks in zip(group.out_features, group.out_chunks):
        rows[:, y_at : y_at + width] += delta[:, delta_at : delta_at + width]
        y_at, delta_at = y_at + width, delta_at + out_chunks * CHUNK


def _as_chunks(x: torch.Tensor, in_chunks: int) -> torch.Tensor:
    """[rows, features] as [rows * in_chunks, 128], padded with zeros."""
    padding = in_chunks * CHUNK - x.shape[1]
    return (F.pad(x, (0, padding)) if padding else x).reshape(-1, CHUNK)


def _add_segment(
    y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, segment: SegmentRows
) -> None:
    rows = segment.rows
    a = _matrix(chunks, rows.a_ids, segment.a_ids)[:, : group.in_features]
    low_rank = x[segment.start : segment.stop] @ a.T
    for i, part in enumerate(rows.parts):
        width = group.out_features[part.index]
        at = sum(group.out_features[: part.index])
        b = _matrix(chunks, part.b_ids, None if segment.b_ids is None else segment.b_ids[i])[:, :width]
        target = y[segment.start : segment.stop, at : at + width]
        target.addmm_(low_rank[:, slice(*part.rows)], b, alpha=part.scale)


def _matrix(chunks: torch.Tensor, ids: Int64Array, gather: torch.Tensor | None) -> torch.Tensor:
    """[rows, padded width] of the arena: gathered, or a view where ``ids [rows, stride]`` are one run."""
    if gather is not None:
        return chunks.index_select(0, gather).view(ids.shape[0], -1)
    first = int(ids[0, 0])
    return chunks[first : first + ids.size].view(ids.shape[0], -1)
