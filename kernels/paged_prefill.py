"""Causal attention of chunks of new tokens over their sequences' pages (FlashAttention, https://arxiv.org/abs/2307.08691).

A *tile* is a run of one sequence's new tokens; a program takes a tile with all query heads of one K/V head, so that
each key is read once for the whole group. Blocks of keys start at multiples of the block size whatever the chunk, so a
token's result does not depend on its neighbours, nor on how its prompt is cut into chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loraplex.kernels.attention_block import LOG2_E, attend_block
from loraplex.kernels.paged_decode import read_keys
from loraplex.kernels.triton_runtime import dot_dtype, power_of_two, register_operator, step_jit, tl

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


def paged_prefill(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    row_starts: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """``softmax(scale * q K^T) V`` of each new token over those before it, itself included, in fp32 inside.

    Args:
        q: [rows, H, D]; the rows of a sequence stand together; consecutive heads share a K/V head.
        pages: [P, 2, T, KVH, D], one layer of the arena, same dtype; only keys that are seen are read.
        page_table: [S, max_pages] int32.
        row_starts: [S + 1] int32, the first row of each sequence and, last, the number of rows.
        lengths: [S] int32, keys of each sequence; its rows are the last of them.
        tiles: [n, 2] int32, of ``prefill_tiles`` with the same rows, ``tile_queries`` a tile.
        scale: of the scores, positive.
        window: how many keys are visible, the token's own included; 0 is all.

    Returns:
        [rows, H, D] in the dtype of ``q``; 0 in rows of no sequence.
    """
    result: torch.Tensor = torch.ops.loraplex.paged_prefill(
        q, pages, page_table, row_starts, lengths, tiles, scale, window
    )
    return result


def tile_queries(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """New tokens of one tile."""
    return max(1, _shape(power_of_two(head_dim), heads // kv_heads, dtype)[0] // (heads // kv_heads))


def prefill_tiles(row_starts: Int32Array, lengths: Int32Array, queries: int) -> Int32Array:
    """The work of a step: (sequence, its first new token of the tile), what takes longest first.

    Args:
        row_starts: [S + 1] int32.
        lengths: [S] int32.
        queries: tokens of a tile.

    Returns:
        [n, 2] int32.
    """
    rows = np.diff(row_starts)
    counts = -(-rows // queries)
    sequence = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    ends = np.cumsum(counts)
    first = (np.arange(len(sequence)) - np.repeat(ends - counts, counts)) * queries
    keys = (lengths - rows)[sequence] + first
    tiles: Int32Array = np.stack((sequence, first.astype(np.int32)), axis=1)[np.argsort(-keys, kind="stable")]
    return tiles


def paged_prefill_reference(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    row_starts: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """The plain form, one sequence at a time, in float32 or the float64 of its inputs."""
    out = torch.zeros_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    starts = row_starts.tolist()
    for sequence, length in enumerate(lengths.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        position = torch.arange(length - (rows.stop - rows.start), length, device=q.device)[:, None]
        first = max(0, length - (rows.stop - rows.start) - window + 1) if window else 0
        k, v = read_keys(pages, page_table[sequence], first, length, q.shape[1])
        key = torch.arange(first, length, device=q.device)[None, :]
        seen = (key <= position) & (key > position - window) if window else key <= position
        scores = torch.einsum("rhd,nhd->hrn", q[rows].to(wide), k.to(wide)) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hrn,nhd->rhd", weights, v.to(wide)).to(q.dtype)
    return out


@step_jit(arrays=("page_table", "row_starts", "lengths", "tiles"))
def _prefill_tiles(
    q_ptr: tl.tensor,
    pages: tl.tensor,
    page_table: tl.tensor,
    row_starts: tl.tensor,
    lengths: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    tile = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    sequence = tl.load(tiles + tile * 2)
    first_query = tl.load(tiles + tile * 2 + 1)
    first_row = tl.load(row_starts + sequence)
    rows = tl.load(row_starts + sequence + 1) - first_row
    before = tl.load(lengths + sequence) - rows
    m = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    query = first_query + m // GROUP
    mine = ((m < QUERIES * GROUP) & (query < rows))[:, None] & (d < D)[None, :]
    at = ((first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=mine, other=0.0)
    table = page_table + sequence.to(tl.int64) * table_stride
    position = before + query
    first = before + first_query
    stop = before + tl.minimum(first_query + QUERIES, rows)
    acc = tl.zeros([M, D_PAD], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    # Where nothing is hidden from any query of the tile, blocks need no mask.
    low = first * 0
    masked_from = (first + 1) // BLOCK * BLOCK
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0)
        masked_from = low // BLOCK * BLOCK
    else:
        for block in range(0, masked_from, BLOCK):
            acc, peak, total = attend_block(
                q, acc, peak, total, pages, table, block, low, stop, position, head, scale, page_stride,
                KV_HEADS, D, D_PAD, PAGE, BLOCK, WINDOW, False, DOT,
            )  # fmt: skip
    for block in range(masked_from, stop, BLOCK):
        acc, peak, total = attend_block(
            q, acc, peak, total, pages, table, block, low, stop, position, head, scale, page_stride,
            KV_HEADS, D, D_PAD, PAGE, BLOCK, WINDOW, True, DOT,
        )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at, result, mask=mine)


def launch_paged_prefill(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    row_starts: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """``paged_prefill`` by a kernel over tiles and K/V heads."""
    heads, d = q.shape[1:]
    q, out = q.contiguous(), torch.zeros_like(q, memory_format=torch.contiguous_format)
    if not len(tiles):
        return out
    page_tokens, kv_heads = pages.shape[2:4]
    d_pad, group = power_of_two(d), heads // kv_heads
    m, block, warps, stages = _shape(d_pad, group, q.dtype)
    _prefill_tiles[(len(tiles) * kv_heads,)](
        q, pages, page_table, row_starts, lengths, tiles, out,
        scale * LOG2_E, pages.stride(0), page_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, QUERIES=tile_queries(heads, kv_heads, d, q.dtype), M=m, D=d, D_PAD=d_pad,
        PAGE=page_tokens, BLOCK=block, WINDOW=window, DOT=dot_dtype(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _shape(d_pad: int, group: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows of a tile (tokens x heads of the group), keys of a block, warps and pipeline stages, by head size.

    For stages see ``paged_decode``. Rows are 128 where that makes Hopper's and Blackwell's own matrix instructions.
    """
    if dtype == torch.float32:
        m, block, warps, stages = 16, 32, 8, 2
    else:
        m, block, warps, stages = (128, 64, 8, 5) if d_pad <= 128 else (64, 32, 8, 5)
    return max(m, power_of_two(group)), block, warps, stages


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register_operator(
    "paged_prefill(Tensor q, Tensor pages, Tensor page_table, Tensor row_starts, Tensor lengths, Tensor tiles,"
    " float scale, int window) -> Tensor",
    reference=paged_prefill_reference,
    launch=launch_paged_prefill,
    fake=_fake,
)
