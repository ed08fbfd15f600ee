"""Rotary position embedding of new queries and keys, and the write of keys and values to their pages, in one pass.

Rotary embedding, https://arxiv.org/abs/2104.09864, with the first half of a head paired with the second.
"""

from __future__ import annotations

import torch

from loraplex.kernels.norms import rms_norm_reference
from loraplex.kernels.triton_runtime import load_fact, power_of_two, register_operator, step_jit, tl, triton


def rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate the queries; rotate the keys and store them and the values: ``(x1 c - x2 s, x2 c + x1 s)`` of each head.

    Args:
        qkv: [rows, (H + 2 KVH) * D], queries, keys and values.
        positions: [rows] int32 or int64.
        rotary: [max_positions, D] float32, D / 2 cosines and then D / 2 sines of each position.
        q_norm, k_norm: [D] weights of an RMSNorm over each head before it is rotated; both or neither.
        eps: of that norm.
        pages: [P, 2, T, KVH, D], one layer of the arena, contiguous, same dtype; changed in place.
        slots: [rows] int32 or int64, ``2 T page + place`` of each token; negative stores nothing.

    Returns:
        [rows, H, D] rotated queries.
    """
    q: torch.Tensor = torch.ops.loraplex.rope_write(qkv, positions, rotary, q_norm, k_norm, eps, pages, slots)
    return q


def rope_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The plain form, in float32 or the float64 of its inputs."""
    page_tokens, kv_heads, d = pages.shape[2:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q, k, v = qkv.unflatten(1, (-1, d)).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    cos, sin = rotary[positions.long()][:, None].chunk(2, dim=-1)
    tokens, stored = pages.view(-1, kv_heads, d), slots >= 0
    tokens[slots[stored].long()] = _rotated(k, cos, sin)[stored]
    tokens[slots[stored].long() + page_tokens] = v[stored]
    return _rotated(q, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@step_jit(arrays=("positions", "slots"))
def _rope_write(
    qkv: tl.tensor,
    positions: tl.tensor,
    rotary: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    pages: tl.tensor,
    slots: tl.tensor,
    q_out: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF_PAD)
    half = D // 2
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < half)[None, :]
    at = (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * D + d[None, :]
    first = tl.load(qkv + at, mask=inside, other=0.0)
    second = tl.load(qkv + at + half, mask=inside, other=0.0)
    dtype = first.dtype
    is_q = (head < HEADS)[:, None]
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.where(is_v, 1.0, tl.rsqrt(square / D + eps)[:, None])
        w_first = tl.where(
            is_q, tl.load(q_norm + d, mask=d < half)[None, :], tl.load(k_norm + d, mask=d < half)[None, :]
        )
        w_second = tl.where(
            is_q, tl.load(q_norm + half + d, mask=d < half)[None, :], tl.load(k_norm + half + d, mask=d < half)[None, :]
        )
        # Rounded where the plain form rounds; values stay as they are.
        first = (first * scale).to(dtype).to(tl.float32) * tl.where(is_v, 1.0, w_first.to(tl.float32))
        second = (second * scale).to(dtype).to(tl.float32) * tl.where(is_v, 1.0, w_second.to(tl.float32))
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    angle = rotary + load_fact(positions + row).to(tl.int64) * D + d
    cos = tl.where(is_v, 1.0, tl.load(angle, mask=d < half, other=0.0).to(tl.float32)[None, :])
    sin = tl.where(is_v, 0.0, tl.load(angle + half, mask=d < half, other=0.0).to(tl.float32)[None, :])
    turned_first = (first * cos - second * sin).to(dtype)
    turned_second = (second * cos + first * sin).to(dtype)
    q_at = q_out + (row * HEADS + head)[:, None] * D + d[None, :]
    tl.store(q_at, turned_first, mask=inside & is_q)
    tl.store(q_at + half, turned_second, mask=inside & is_q)
    slot = load_fact(slots + row).to(tl.int64)
    kv = head - HEADS
    token = tl.where(kv < KV_HEADS, kv, kv - KV_HEADS + PAGE * KV_HEADS)
    kv_at = pages + (slot * KV_HEADS + token)[:, None] * D + d[None, :]
    stored = inside & (kv >= 0)[:, None] & (slot >= 0)
    tl.store(kv_at, turned_first, mask=stored)
    tl.store(kv_at + half, turned_second, mask=stored)


def launch_rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """``rope_write`` by programs over rows and blocks of heads."""
    if not pages.is_contiguous():
        raise ValueError("pages: keys are written in place, so it must be contiguous")
    page_tokens, kv_heads, d = pages.shape[2:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = qkv.new_empty((len(qkv), heads, d))
    if len(qkv):
        half = power_of_two(d // 2)
        block = min(max(1, 1024 // half), power_of_two(heads + 2 * kv_heads))
        has_norm = q_norm is not None and k_norm is not None
        _rope_write[(len(qkv), triton.cdiv(heads + 2 * kv_heads, block))](
            qkv.contiguous(), positions, rotary, q_norm if has_norm else qkv, k_norm if has_norm else qkv, eps,
            pages, slots, q, HEADS=heads, KV_HEADS=kv_heads, D=d, HALF_PAD=half, PAGE=page_tokens, BLOCK=block,
            NORM=has_norm, num_warps=4,
        )  # fmt: skip
    return q


def _fake(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    del positions, rotary, q_norm, k_norm, eps, slots
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // pages.shape[4] - 2 * pages.shape[3], pages.shape[4]))


register_operator(
    "rope_write(Tensor qkv, Tensor positions, Tensor rotary, Tensor? q_norm, Tensor? k_norm, float eps,"
    " Tensor(a!) pages, Tensor slots) -> Tensor",
    reference=rope_write_reference,
    launch=launch_rope_write,
    fake=_fake,
)
