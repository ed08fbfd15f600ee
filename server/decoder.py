"""The decoder: one forward pass over a step's flat rows, for every architecture of ``traits.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from loraplex.kernels import ops
from loraplex.kernels.attention_plan import AttentionPlan
from loraplex.kernels.dense_linear import DenseLinear
from loraplex.kernels.lora import add_embedding_lora
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.lora_work import EmbeddingRows
from loraplex.kernels.step_adapters import StepAdapters
from loraplex.server.rms_norm import rms_norm
from loraplex.server.traits import ModelTraits
from loraplex.server.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """A step's rows. Rows that samples are taken from are chosen by ``logit_rows``.

    Attributes:
        tokens: [rows] int64.
        attention: where their keys and values lie.
        adapters: over all rows; None where no row has one.
        embedding: the adapters' work at the embedding.
        logit_rows: [n] int64, the rows whose logits are wanted.
        logit_adapters: adapters over the ``logit_rows``, in their order.
    """

    tokens: torch.Tensor
    attention: AttentionPlan
    adapters: StepAdapters | None
    embedding: tuple[EmbeddingRows, ...]
    logit_rows: torch.Tensor
    logit_adapters: StepAdapters | None


class Decoder:
    """A frozen Llama-like decoder.

    Args:
        traits: its dimensions and peculiarities.
        weights: its weights, on one device, in one dtype.
    """

    def __init__(self, traits: ModelTraits, weights: DecoderWeights) -> None:
        self._traits = traits
        self._weights = weights
        self._inv_freq = traits.inv_freq.to(weights.embedding.device)
        shape = traits.base_shape
        self.qkv_group = _group(shape.sites, "q_proj", "k_proj", "v_proj")
        self.o_group = _group(shape.sites, "o_proj")
        self.gate_up_group = _group(shape.sites, "gate_proj", "up_proj")
        self.down_group = _group(shape.sites, "down_proj")
        self.lm_head_group = _group(shape.model_sites, "lm_head")
        self.embedding_group = _group(shape.model_sites, "embed_tokens")

    def forward(self, step: DecoderInput, arena: torch.Tensor) -> torch.Tensor:
        """Run a step; K/V of its rows are written to their pages.

        Args:
            step: the rows.
            arena: [num_layers, num_pages, page_elems], K/V pages and adapter pages.

        Returns:
            [n, vocabulary] float32 logits of ``step.logit_rows``.
        """
        weights = self._weights
        whole = arena.view(-1, 128)
        x = F.embedding(step.tokens, weights.embedding)
        for work in step.embedding:
            add_embedding_lora(x, whole, work)
        rotary = self._rotary(step.attention.positions, x.dtype)
        for layer in range(self._traits.num_layers):
            x = self._layer(layer, x, step, rotary, arena[layer])
        if not len(step.logit_rows):
            return x.new_empty((0, self._traits.vocab_size), dtype=torch.float32)
        x = self._norm(x.index_select(0, step.logit_rows), weights.norm)
        logits = weights.lm_head(x)
        if step.logit_adapters is not None:
            step.logit_adapters.add_model(logits, x, whole, self.lm_head_group)
        return logits.float()

    def _layer(
        self,
        index: int,
        x: torch.Tensor,
        step: DecoderInput,
        rotary: tuple[torch.Tensor, torch.Tensor],
        arena: torch.Tensor,
    ) -> torch.Tensor:
        weights = self._weights.layers[index]
        h = self._norm(x, weights.input_norm)
        qkv = self._linear(weights.qkv, h, index, self.qkv_group, step, arena)
        h = self._attend(index, qkv, weights, step.attention, rotary, arena)
        x = x + self._linear(weights.o, h, index, self.o_group, step, arena)
        return x + self._feed_forward(index, self._norm(x, weights.post_norm), step, arena)

    def _linear(
        self,
        linear: DenseLinear,
        x: torch.Tensor,
        layer: int,
        group: SiteGroup,
        step: DecoderInput,
        arena: torch.Tensor,
    ) -> torch.Tensor:
        """A linear, or several over the same input, with what the adapters change of it."""
        y = linear(x)
        if step.adapters is not None:
            step.adapters.add(y, x, arena.view(-1, 128), layer, group, linear.bias)
        return y

    def _feed_forward(self, layer: int, x: torch.Tensor, step: DecoderInput, arena: torch.Tensor) -> torch.Tensor:
        weights = self._weights.layers[layer]
        adapters = step.adapters
        if adapters is None:
            return weights.down(_gated(weights.gate_up(x)))
        chunks = arena.view(-1, 128)
        gate_up = weights.gate_up(x)
        experts = adapters.run_experts(gate_up, x, chunks, layer, self.gate_up_group, weights.gate_up.bias, F.silu)
        adapters.add(gate_up, x, chunks, layer, self.gate_up_group, weights.gate_up.bias)
        h = _gated(gate_up) if experts is None else experts.combine(len(x), partial(_gated, gate_up))
        down = weights.down(h)
        adapters.add(down, h, chunks, layer, self.down_group, weights.down.bias)
        if experts is not None:
            experts.add_down(down, chunks, layer, self.down_group, weights.down, weights.down.bias)
        return down

    def _attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        weights: LayerWeights,
        plan: AttentionPlan,
        rotary: tuple[torch.Tensor, torch.Tensor],
        arena: torch.Tensor,
    ) -> torch.Tensor:
        t = self._traits
        rows = qkv.shape[0]
        q, k, v = qkv.split((t.q_size, t.kv_size, t.kv_size), dim=-1)
        q, k = q.reshape(rows, t.num_heads, t.head_dim), k.reshape(rows, t.num_kv_heads, t.head_dim)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        ops.write_kv(arena.view(-1, t.kv_size), k.view(rows, -1), v, plan.k_slots, plan.v_slots)
        half_pages = arena.view(arena.shape[0] * 2, -1, t.num_kv_heads, t.head_dim)
        return self._attention(q, half_pages, plan, t.windows[layer])

    def _attention(
        self, q: torch.Tensor, half_pages: torch.Tensor, plan: AttentionPlan, window: int | None
    ) -> torch.Tensor:
        """[rows, heads, head_dim] queries to [rows, heads * head_dim]."""
        t = self._traits
        rows, group = q.shape[0], t.num_heads // t.num_kv_heads
        out = torch.empty_like(q)
        q = q.view(rows, t.num_kv_heads, group, t.head_dim)
        result = out.view(rows, t.num_kv_heads, group, t.head_dim)
        for bucket in plan.buckets:
            attended = ops.decode_attention(
                q.index_select(0, bucket.rows),
                half_pages,
                bucket.k_pages,
                bucket.v_pages,
                bucket.unused,
                bucket.masks[window],
            )
            result.index_copy_(0, bucket.rows, attended)
        for span in plan.prefills:
            queries = q[span.start : span.stop].permute(2, 1, 0, 3)
            attended = ops.prefill_attention(
                queries, half_pages, span.k_pages, span.v_pages, span.num_keys, span.masks[window]
            )
            result[span.start : span.stop].copy_(attended.permute(2, 1, 0, 3))
        return out.view(rows, -1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._traits.rms_eps)

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [rows, 1, head_dim]."""
        angles = positions[:, None].float() * self._inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        scale = self._traits.rope_scale
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _group(features: Mapping[str, tuple[int, int]], *sites: str) -> SiteGroup:
    return SiteGroup(sites, features[sites[0]][0], tuple(features[site][1] for site in sites))


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, https://arxiv.org/abs/2002.05202."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [rows, heads, head_dim], the first half of a head paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
