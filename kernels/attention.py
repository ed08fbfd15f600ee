"""Attention of a step as the decoder sees it: fused queries, keys and values in, attended values out.

``PlainAttention`` runs the operators of ``ops.py`` on any device; ``paged_attention.py`` has the kernels for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from loraplex.kernels import ops
from loraplex.kernels.attention_plan import AttentionPlan
from loraplex.kernels.norms import rms_norm_reference

PlanT = TypeVar("PlanT", contravariant=True)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model. ``norm_eps`` is that of the RMSNorm over each head of q and k, where there is one."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding, https://arxiv.org/abs/2104.09864: ``inv_freq [head_dim / 2]`` float32, and a factor on cosines
    and sines."""

    inv_freq: torch.Tensor
    scale: float

    def table(self, max_positions: int, device: torch.device) -> torch.Tensor:
        """[max_positions, head_dim] float32: each position's cosines, then its sines."""
        angles = torch.arange(max_positions, device=device).float()[:, None] * self.inv_freq.to(device)[None, :]
        return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(self.scale)


class AttentionStep(Protocol):
    """Attention over the rows of one step."""

    def attend(
        self,
        qkv: torch.Tensor,
        arena: torch.Tensor,
        window: int | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the rows' keys and values, and attend.

        Args:
            qkv: [rows, (H + 2 KVH) * D].
            arena: [num_pages, page_elems], of this layer; the pages of the rows are written.
            window: how many keys a row sees, its own included; None is all.
            q_norm, k_norm: [D] weights of an RMSNorm over each head before it is rotated; both or neither.

        Returns:
            [rows, H * D].
        """


class Attention(Protocol[PlanT]):
    """Attention by one set of kernels, and the plans that it takes."""

    def begin(self, plan: PlanT, dtype: torch.dtype) -> AttentionStep:
        """What all layers of a step share."""


class PlainAttention:
    """Attention by plain operators.

    Args:
        heads: of the model.
        rotary: of the model.
        device: of the step's tensors.
    """

    def __init__(self, heads: Heads, rotary: Rotary, device: torch.device) -> None:
        self._heads = heads
        self._inv_freq = rotary.inv_freq.to(device)
        self._scale = rotary.scale

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> PlainAttentionStep:
        """Cosines and sines of the rows."""
        angles = plan.positions[:, None].float() * self._inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return PlainAttentionStep(
            self._heads, plan, (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)
        )


@dataclass(frozen=True, slots=True)
class PlainAttentionStep:
    """A step of ``PlainAttention``; ``cos`` and ``sin`` are [rows, 1, head_dim]."""

    heads: Heads
    plan: AttentionPlan
    cos: torch.Tensor
    sin: torch.Tensor

    def attend(
        self,
        qkv: torch.Tensor,
        arena: torch.Tensor,
        window: int | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """As in ``AttentionStep``."""
        heads, rows = self.heads, qkv.shape[0]
        kv_size = heads.num_kv_heads * heads.head_dim
        q, k, v = qkv.split((heads.num_heads * heads.head_dim, kv_size, kv_size), dim=-1)
        q, k = q.reshape(rows, heads.num_heads, heads.head_dim), k.reshape(rows, heads.num_kv_heads, heads.head_dim)
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm_reference(q, q_norm, heads.norm_eps), rms_norm_reference(k, k_norm, heads.norm_eps)
        q, k = self._rotate(q), self._rotate(k)
        ops.write_kv(arena.view(-1, kv_size), k.view(rows, -1), v, self.plan.k_slots, self.plan.v_slots)
        half_pages = arena.view(arena.shape[0] * 2, -1, heads.num_kv_heads, heads.head_dim)
        return self._attend(q, half_pages, window)

    def _attend(self, q: torch.Tensor, half_pages: torch.Tensor, window: int | None) -> torch.Tensor:
        """[rows, heads, head_dim] queries to [rows, heads * head_dim]."""
        heads, rows = self.heads, q.shape[0]
        group = heads.num_heads // heads.num_kv_heads
        out = torch.empty_like(q)
        q = q.view(rows, heads.num_kv_heads, group, heads.head_dim)
        result = out.view(rows, heads.num_kv_heads, group, heads.head_dim)
        for bucket in self.plan.buckets:
            attended = ops.decode_attention(
                q.index_select(0, bucket.rows),
                half_pages,
                bucket.k_pages,
                bucket.v_pages,
                bucket.unused,
                bucket.masks[window],
            )
            result.index_copy_(0, bucket.rows, attended)
        for span in self.plan.prefills:
            queries = q[span.start : span.stop].permute(2, 1, 0, 3)
            attended = ops.prefill_attention(
                queries, half_pages, span.k_pages, span.v_pages, span.num_keys, span.masks[window]
            )
            result[span.start : span.stop].copy_(attended.permute(2, 1, 0, 3))
        return out.view(rows, -1)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of [rows, heads, head_dim], the first half of a head paired with the second."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin
