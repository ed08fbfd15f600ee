"""Attention of a step by the kernels for GPUs: rows that decode first, then the chunks of prompts.

All that varies from step to step lies in the tensors of ``PagedPlan``, whose shapes are capacities: what is left over
holds work that does nothing, so a captured graph can be replayed for any step that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.kernels.attention import Heads, Rotary
from loraplex.kernels.paged_decode import paged_decode
from loraplex.kernels.paged_prefill import paged_prefill
from loraplex.kernels.rope_write import rope_write


class OtherKernels(Protocol):
    """Attention kernels of a library, such as ``FlashInferAttention``. In steps with prompts no row may pad."""

    def decode(self, q: torch.Tensor, pages: torch.Tensor, window: int | None) -> torch.Tensor:
        """``paged_decode`` of the rows that decode: [B, H, D] to [B, H, D]."""

    def prefill(self, q: torch.Tensor, pages: torch.Tensor, window: int | None) -> torch.Tensor:
        """``paged_prefill`` of the chunks of prompts: [rows, H, D] to [rows, H, D]."""


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """Where a step's keys and values lie, in tensors on the device.

    Rows that decode stand first, chunks of prompts right behind them; rows behind those pad.

    Attributes:
        positions: [rows] int32.
        slots: [rows] int32, ``2 page_tokens * page + place`` of each row's key; -1 stores nothing.
        lengths: [B] int32, keys of each row that decodes; 0 where a row of the first B does not.
        page_table: [B, pages] int32, theirs.
        decode_tiles: by window, ``tiles`` and ``tile_starts`` of ``paged_decode``; none where B is 0.
        row_starts: [S + 1] int32, the first row of each prompt's chunk.
        prompt_lengths: [S] int32, keys of each prompt.
        prompt_table: [S, pages] int32, theirs.
        prefill_tiles: [n, 2] int32, of ``paged_prefill``; none where there are no prompts.
        other: kernels that were told of this step already, in place of ours.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    page_table: torch.Tensor
    decode_tiles: Mapping[int | None, tuple[torch.Tensor, torch.Tensor]]
    row_starts: torch.Tensor
    prompt_lengths: torch.Tensor
    prompt_table: torch.Tensor
    prefill_tiles: torch.Tensor
    other: OtherKernels | None = None


class PagedAttention:
    """Attention by the paged kernels.

    Args:
        heads: of the model.
        rotary: of the model.
        max_positions: the longest context.
        device: of the kernels.
    """

    def __init__(self, heads: Heads, rotary: Rotary, max_positions: int, device: torch.device) -> None:
        self._heads = heads
        self._rotary = rotary.table(max_positions, device)

    def begin(self, plan: PagedPlan, dtype: torch.dtype) -> PagedAttentionStep:
        """As in ``Attention``."""
        del dtype  # rotated in float32
        return PagedAttentionStep(self._heads, self._rotary, plan)


@dataclass(frozen=True, slots=True)
class PagedAttentionStep:
    """A step of ``PagedAttention``; ``rotary`` is [max_positions, head_dim], see ``rope_write``."""

    heads: Heads
    rotary: torch.Tensor
    plan: PagedPlan

    def attend(
        self,
        qkv: torch.Tensor,
        arena: torch.Tensor,
        window: int | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """As in ``attention.AttentionStep``."""
        heads, plan = self.heads, self.plan
        pages = arena.view(arena.shape[0], 2, -1, heads.num_kv_heads, heads.head_dim)
        q = rope_write(qkv, plan.positions, self.rotary, q_norm, k_norm, heads.norm_eps, pages, plan.slots)
        decodes = len(plan.lengths)
        if not len(plan.prefill_tiles):
            return self._decode(q, pages, window).view(len(q), -1)
        if plan.other is not None:
            parts = [self._decode(q[:decodes], pages, window)] if decodes else []
            return torch.cat((*parts, plan.other.prefill(q[decodes:], pages, window))).view(len(q), -1)
        out = paged_prefill(
            q,
            pages,
            plan.prompt_table,
            plan.row_starts,
            plan.prompt_lengths,
            plan.prefill_tiles,
            heads.scale,
            window or 0,
        )
        if decodes:
            # Where the chunks begin among the first rows is known to the device alone.
            decoded, is_decode = self._decode(q[:decodes], pages, window), (plan.lengths > 0)[:, None, None]
            out[:decodes] = torch.where(is_decode, decoded, out[:decodes])
        return out.view(len(q), -1)

    def _decode(self, q: torch.Tensor, pages: torch.Tensor, window: int | None) -> torch.Tensor:
        plan = self.plan
        if plan.other is not None:
            return plan.other.decode(q, pages, window)
        tiles, tile_starts = plan.decode_tiles[window]
        return paged_decode(q, pages, plan.page_table, plan.lengths, tiles, tile_starts, self.heads.scale, window or 0)
