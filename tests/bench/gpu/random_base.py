"""A base model of random weights, made on its device, for this engine and for transformers alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from costs import ModelShape
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loraplex.kernels.dense_linear import DenseLinear
from loraplex.server.traits import ModelTraits, read_traits
from loraplex.server.weights import DecoderWeights, LayerWeights

_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Base:
    """A base model.

    Attributes:
        tensors: by name, fused as the engine has them: ``embedding``, ``norm``, ``head``, and for each layer ``qkv.0``,
            ``o.0``, ``gate_up.0``, ``down.0``, ``input_norm.0``, ``post_norm.0``.
    """

    shape: ModelShape
    config: LlamaConfig
    traits: ModelTraits
    tensors: dict[str, torch.Tensor]
    device: torch.device
    dtype: torch.dtype

    def weights(self) -> DecoderWeights:
        """As the engine has them."""
        t = self.tensors
        layers = tuple(
            LayerWeights(
                input_norm=t[f"input_norm.{i}"],
                qkv=DenseLinear(t[f"qkv.{i}"]),
                q_norm=None,
                k_norm=None,
                o=DenseLinear(t[f"o.{i}"]),
                post_norm=t[f"post_norm.{i}"],
                gate_up=DenseLinear(t[f"gate_up.{i}"]),
                down=DenseLinear(t[f"down.{i}"]),
            )
            for i in range(self.shape.layers)
        )
        count = sum(tensor.numel() for tensor in t.values())
        return DecoderWeights(t["embedding"], layers, t["norm"], DenseLinear(t["head"]), count)

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """The same weights elsewhere."""
        tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        return Base(self.shape, self.config, self.traits, tensors, device, dtype)

    def transformers_model(self) -> Any:
        """The same model by transformers, sharing these tensors."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        model.model.rotary_emb = LlamaRotaryEmbedding(self.config).to(self.device)
        q, kv = self.traits.q_size, self.traits.kv_size
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            parts = self._of("qkv", index).split((q, kv, kv))
            for linear, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts):
                _set(linear, part)
            _set(attention.o_proj, self._of("o", index))
            gate, up = self._of("gate_up", index).chunk(2)
            _set(mlp.gate_proj, gate)
            _set(mlp.up_proj, up)
            _set(mlp.down_proj, self._of("down", index))
            _set(layer.input_layernorm, self._of("input_norm", index))
            _set(layer.post_attention_layernorm, self._of("post_norm", index))
        _set(model.model.embed_tokens, self.tensors["embedding"])
        _set(model.model.norm, self.tensors["norm"])
        _set(model.lm_head, self.tensors["head"])
        return model.eval()

    def _of(self, name: str, layer: int) -> torch.Tensor:
        return self.tensors[f"{name}.{layer}"]


def _set(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)


def make_base(shape: ModelShape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Base:
    """Random weights of a shape; norms are 1."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.empty((rows, columns), device=device, dtype=dtype).normal_(0, _SPREAD, generator=generator)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = torch.ones(shape.hidden, device=device, dtype=dtype)
    tensors = {"embedding": draw(shape.vocabulary, shape.hidden), "norm": ones}
    tensors["head"] = draw(shape.vocabulary, shape.hidden)
    for i in range(shape.layers):
        tensors |= {
            f"qkv.{i}": draw(q + 2 * kv, shape.hidden),
            f"o.{i}": draw(shape.hidden, q),
            f"gate_up.{i}": draw(2 * shape.ffn, shape.hidden),
            f"down.{i}": draw(shape.hidden, shape.ffn),
            f"input_norm.{i}": ones,
            f"post_norm.{i}": ones,
        }
    return Base(shape, config, read_traits(config), tensors, device, dtype)
