"""The decoder: one forward pass over a step's flat rows, for every architecture of ``traits.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from loraplex.kernels.attention import Attention, Heads, PlainAttention, Rotary
from loraplex.kernels.dense_linear import DenseLinear
from loraplex.kernels.gated import silu_mul
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.norms import add_rms_norm, rms_norm
from loraplex.kernels.step_adapters import LayerAdapters
from loraplex.server.traits import ModelTraits
from loraplex.server.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """A step's rows. Rows that samples are taken from are chosen by ``logit_rows``.

    Attributes:
        tokens: [rows] int64 or int32.
        attention: where their keys and values lie: a plan of the decoder's attention.
        adapters: over all rows; None where no row has one.
        logit_rows: [n] integers, the rows whose logits are wanted; None is all of them.
        logit_adapters: adapters over the ``logit_rows``, in their order.
    """

    tokens: torch.Tensor
    attention: Any
    adapters: LayerAdapters | None
    logit_rows: torch.Tensor | None
    logit_adapters: LayerAdapters | None


class Decoder:
    """A frozen Llama-like decoder.

    Args:
        traits: its dimensions and peculiarities.
        weights: its weights, on one device, in one dtype.
        attention: by which kernels; plain operators by default.
    """

    def __init__(self, traits: ModelTraits, weights: DecoderWeights, attention: Attention[Any] | None = None) -> None:
        self._traits = traits
        self._weights = weights
        self._attention = attention or PlainAttention(heads_of(traits), rotary_of(traits), weights.embedding.device)
        shape = traits.base_shape
        self.qkv_group = _group(shape.sites, "q_proj", "k_proj", "v_proj")
        self.o_group = _group(shape.sites, "o_proj")
        self.gate_up_group = _group(shape.sites, "gate_proj", "up_proj")
        self.down_group = _group(shape.sites, "down_proj")
        self.lm_head_group = _group(shape.model_sites, "lm_head")
        self.embedding_group = _group(shape.model_sites, "embed_tokens")

    @property
    def layer_groups(self) -> tuple[SiteGroup, ...]:
        """The linears of a layer that adapters may change, in the order of adapter images."""
        return self.qkv_group, self.o_group, self.gate_up_group, self.down_group

    @property
    def model_groups(self) -> tuple[SiteGroup, ...]:
        """The matrices that belong to no layer, likewise."""
        return self.lm_head_group, self.embedding_group

    def forward(self, step: DecoderInput, arena: torch.Tensor) -> torch.Tensor:
        """Run a step; K/V of its rows are written to their pages.

        Args:
            step: the rows.
            arena: [num_layers, num_pages, page_elems], K/V pages and adapter pages.

        Returns:
            [n, vocabulary] float32 logits of ``step.logit_rows``.
        """
        weights, adapters = self._weights, step.adapters
        whole = arena.view(-1, 128)
        x = F.embedding(step.tokens, weights.embedding)
        if adapters is not None:
            adapters.add_embedding(x, step.tokens, whole, self.embedding_group)
        attention = self._attention.begin(step.attention, x.dtype)
        h = rms_norm(x, weights.layers[0].input_norm, self._traits.rms_eps)
        for index, layer in enumerate(weights.layers):
            if adapters is not None:
                adapters.await_layer(index)
            if index:
                h, x = add_rms_norm(h, x, layer.input_norm, self._traits.rms_eps)
            qkv = self._linear(layer.qkv, h, index, self.qkv_group, adapters, arena[index])
            h = attention.attend(qkv, arena[index], self._traits.windows[index], layer.q_norm, layer.k_norm)
            h = self._linear(layer.o, h, index, self.o_group, adapters, arena[index])
            h, x = add_rms_norm(h, x, layer.post_norm, self._traits.rms_eps)
            h = self._feed_forward(index, h, adapters, arena[index])
        x = x + h
        if step.logit_rows is not None:
            x = x.index_select(0, step.logit_rows)
        if not len(x):
            return x.new_empty((0, self._traits.vocab_size), dtype=torch.float32)
        x = rms_norm(x, weights.norm, self._traits.rms_eps)
        logits = weights.lm_head(x)
        if step.logit_adapters is not None:
            step.logit_adapters.add_model(logits, x, whole, self.lm_head_group)
        return logits.float()

    def _linear(
        self,
        linear: DenseLinear,
        x: torch.Tensor,
        layer: int,
        group: SiteGroup,
        adapters: LayerAdapters | None,
        arena: torch.Tensor,
    ) -> torch.Tensor:
        """A linear, or several over the same input, with what the adapters change of it."""
        if adapters is None:
            return linear(x)
        return adapters.run(linear, x, arena.view(-1, 128), layer, group)

    def _feed_forward(
        self, layer: int, x: torch.Tensor, adapters: LayerAdapters | None, arena: torch.Tensor
    ) -> torch.Tensor:
        weights = self._weights.layers[layer]
        if adapters is None or not adapters.has_experts:
            gate_up = self._linear(weights.gate_up, x, layer, self.gate_up_group, adapters, arena)
            return self._linear(weights.down, silu_mul(gate_up), layer, self.down_group, adapters, arena)
        chunks, gate_up = arena.view(-1, 128), weights.gate_up(x)
        experts = adapters.run_experts(gate_up, x, chunks, layer, self.gate_up_group, weights.gate_up.bias, "silu")
        adapters.add(gate_up, x, chunks, layer, self.gate_up_group, weights.gate_up.bias)
        h = silu_mul(gate_up) if experts is None else experts.combine(len(x), partial(silu_mul, gate_up))
        down = adapters.run(weights.down, h, chunks, layer, self.down_group)
        if experts is not None:
            experts.add_down(down, chunks, layer, self.down_group, weights.down, weights.down.bias)
        return down


def heads_of(traits: ModelTraits) -> Heads:
    """The model's heads."""
    return Heads(traits.num_heads, traits.num_kv_heads, traits.head_dim, traits.rms_eps)


def rotary_of(traits: ModelTraits) -> Rotary:
    """The model's rotary embedding."""
    return Rotary(traits.inv_freq, traits.rope_scale)


def _group(features: Mapping[str, tuple[int, int]], *sites: str) -> SiteGroup:
    return SiteGroup(sites, features[sites[0]][0], tuple(features[site][1] for site in sites))
