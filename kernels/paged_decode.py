"""Attention of one query token per sequence over its pages, with long sequences split among programs.

A sequence's visible keys are cut into splits whose size depends on its own length alone, and the splits' results are
added in one fixed order: a row is bit-identical whoever its neighbours are. Programs walk over a list of *tiles* (a row
and one of its splits), so that what runs is in proportion to the keys there are, under a grid of fixed size that a CUDA
graph can replay for any lengths. (Flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loraplex.kernels.attention_block import LOG2_E, attend_block
from loraplex.kernels.triton_runtime import (
    dot_dtype,
    load_fact,
    num_resident,
    power_of_two,
    register_operator,
    step_jit,
    tl,
)

SPLIT_KEYS = 128
"""Keys of one split; a multiple of every block size."""

MAX_SPLITS = 32
"""Splits of one row at most: the splits of longer rows are longer."""

ALIGNMENT = 64
"""Under a window the first split starts at a multiple of this."""

SHARED_BYTES = 76_800
"""Shared memory of one program at most, by which is reckoned how many fit on a multiprocessor: three on an H200."""

_STEP_ARRAYS = ("page_table", "lengths", "tiles", "tile_starts", "peaks", "totals")
"""They may begin anywhere in a buffer."""

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


def paged_decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    tile_starts: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """``softmax(scale * q K^T) V`` of each sequence's newest token, in fp32 inside.

    Args:
        q: [B, H, D]; consecutive heads share a K/V head.
        pages: [P, 2, T, KVH, D], one layer of the arena, same dtype; only keys that are seen are read.
        page_table: [B, max_pages] int32.
        lengths: [B] int32, keys of each sequence, the newest included; 0 yields zeros.
        tiles: [capacity, 2] int32 and
        tile_starts: [B + 1] int32, of ``list_decode_tiles`` with the same lengths and window.
        scale: of the scores, positive.
        window: how many keys are visible, the newest included; 0 is all.

    Returns:
        [B, H, D] in the dtype of ``q``.
    """
    result: torch.Tensor = torch.ops.loraplex.paged_decode(
        q, pages, page_table, lengths, tiles, tile_starts, scale, window
    )
    return result


def count_splits(lengths: Int32Array, window: int) -> Int32Array:
    """Splits of each row, at least one: [B] int32."""
    span = np.maximum(lengths - np.maximum(lengths - window, 0) // ALIGNMENT * ALIGNMENT if window else lengths, 1)
    most = SPLIT_KEYS * MAX_SPLITS
    split = SPLIT_KEYS if span.max(initial=1) <= most else SPLIT_KEYS * -(-span // most)
    splits: Int32Array = ((span + (split - 1)) // split).astype(np.int32)
    return splits


def list_decode_tiles(splits: Int32Array) -> tuple[Int32Array, Int32Array]:
    """The work of a step.

    Args:
        splits: [B] int32, of ``count_splits``.

    Returns:
        [n, 2] int32, (row, split) of each tile, and [B + 1] int32, each row's first tile and, last, their number.
    """
    starts = np.zeros(len(splits) + 1, dtype=np.int32)
    np.cumsum(splits, out=starts[1:])
    tiles = np.empty((int(starts[-1]), 2), dtype=np.int32)
    tiles[:, 0] = np.repeat(np.arange(len(splits), dtype=np.int32), splits)
    tiles[:, 1] = np.arange(len(tiles), dtype=np.int32) - np.repeat(starts[:-1], splits)
    return tiles, starts


def paged_decode_reference(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    tile_starts: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """The plain form, one sequence at a time, in float32 or the float64 of its inputs."""
    out = torch.zeros_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    for row, length in enumerate(lengths.tolist()):
        first = max(0, length - window) if window else 0
        k, v = read_keys(pages, page_table[row], first, length, q.shape[1])
        scores = torch.einsum("hd,nhd->hn", q[row].to(wide), k.to(wide)) * scale
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v.to(wide)).to(q.dtype)
    return out


def read_keys(
    pages: torch.Tensor, page_list: torch.Tensor, first: int, stop: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [stop - first, heads, D] of a sequence's tokens, each K/V head repeated for its query heads."""
    token = torch.arange(first, stop, device=pages.device)
    page, slot = page_list[token // pages.shape[2]].long(), token % pages.shape[2]
    repeat = heads // pages.shape[3]
    k, v = (pages[page, half, slot].repeat_interleave(repeat, 1) for half in (0, 1))
    return k, v


@step_jit(numbers=("batch",), arrays=_STEP_ARRAYS)
def _decode_splits(
    q_ptr: tl.tensor,
    pages: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    tiles: tl.tensor,
    tile_starts: tl.tensor,
    partial: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    batch: tl.tensor,
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    items = load_fact(tile_starts + batch) * KV_HEADS
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item // KV_HEADS
        head = item % KV_HEADS
        row = load_fact(tiles + tile * 2)
        place = load_fact(tiles + tile * 2 + 1)
        length = load_fact(lengths + row)
        low = length * 0
        if WINDOW > 0:
            low = tl.maximum(length - WINDOW, 0)
        first = low // ALIGN * ALIGN
        split = SPLIT * tl.cdiv(length - first, SPLIT * SPLITS)
        start = first + place * split
        stop = tl.minimum(start + split, length)
        heads = head * GROUP + g
        mine = (g < GROUP)[:, None] & (d < D)[None, :]
        q_at = q_ptr + (row.to(tl.int64) * (KV_HEADS * GROUP) + heads)[:, None] * D + d[None, :]
        q = tl.load(q_at, mask=mine, other=0.0)
        table = page_table + row.to(tl.int64) * table_stride
        position = g * 0 + length - 1
        acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
        peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        for block in range(start, stop, BLOCK):
            acc, peak, total = attend_block(
                q, acc, peak, total, pages, table, block, low, stop, position, head, scale, page_stride,
                KV_HEADS, D, D_PAD, PAGE, BLOCK, WINDOW, True, DOT,
            )  # fmt: skip
        to = tile.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(peaks + to, peak, mask=g < GROUP)
        tl.store(totals + to, total, mask=g < GROUP)
        tl.store(partial + to[:, None] * D + d[None, :], acc, mask=mine)


@step_jit(arrays=_STEP_ARRAYS)
def _combine_splits(
    tile_starts: tl.tensor,
    partial: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = load_fact(tile_starts + row)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D_PAD)
    there = split < load_fact(tile_starts + row + 1) - first
    at = (first + split).to(tl.int64) * HEADS + head
    peak = tl.load(peaks + at, mask=there, other=float("-inf"))
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(tl.load(totals + at, mask=there, other=0.0) * weight, 0)
    mask = there[:, None] & (d < D)[None, :]
    acc = tl.load(partial + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (row * HEADS + head) * D + d, result, mask=d < D)


def launch_paged_decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    tiles: torch.Tensor,
    tile_starts: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """``paged_decode`` by two kernels: one over tiles and K/V heads, one that puts each row's splits together."""
    batch, heads, d = q.shape
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    if not batch:
        return out
    page_tokens, kv_heads = pages.shape[2:4]
    capacity = len(tiles)
    partial = q.new_empty((capacity, heads, d), dtype=torch.float32)
    peaks, totals = q.new_empty((2, capacity, heads), dtype=torch.float32)
    d_pad, group = power_of_two(d), heads // kv_heads
    block, warps, stages = _shape(d_pad, q.dtype)
    _decode_splits[(min(capacity * kv_heads, num_resident(q.device, SHARED_BYTES)),)](
        q, pages, page_table, lengths, tiles, tile_starts, partial, peaks, totals,
        scale * LOG2_E, batch, pages.stride(0), page_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, power_of_two(group)), D=d, D_PAD=d_pad, PAGE=page_tokens,
        BLOCK=block, WINDOW=window, SPLIT=SPLIT_KEYS, SPLITS=MAX_SPLITS, ALIGN=ALIGNMENT, DOT=dot_dtype(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _combine_splits[(batch, heads)](
        tile_starts, partial, peaks, totals, out, HEADS=heads, D=d, D_PAD=d_pad, SPLITS=MAX_SPLITS, num_warps=4
    )
    return out


def _shape(d_pad: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys of a block, warps and pipeline stages, by head size. Reading a page's id takes stages of its own: with five,
    two blocks of keys and values are on their way at a time."""
    if dtype == torch.float32:
        return (32, 4, 2) if d_pad <= 128 else (16, 4, 2)
    return (64, 4, 5) if d_pad <= 128 else (32, 4, 5)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register_operator(
    "paged_decode(Tensor q, Tensor pages, Tensor page_table, Tensor lengths, Tensor tiles, Tensor tile_starts,"
    " float scale, int window) -> Tensor",
    reference=paged_decode_reference,
    launch=launch_paged_decode,
    fake=_fake,
)
