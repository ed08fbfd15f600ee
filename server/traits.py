"""What distinguishes the supported architectures, read from a transformers configuration.

One decoder (``decoder.py``) serves them all; this table is where they differ. To add an architecture, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.memory.adapter_spec import BaseShape
from loraplex.server.errors import InvalidRequestError


class UnsupportedModelError(InvalidRequestError):
    """The checkpoint is of a kind that is not served; the message names what is."""

    default_code = "unsupported_model"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table: how an architecture departs from Llama. Functions read the transformers configuration.

    Attributes:
        qkv_bias: whether q, k and v have a bias.
        o_bias: whether the attention output has one.
        mlp_bias: whether gate, up and down have one.
        qk_norm: whether each head of q and k is RMS-normalised before the rotary embedding.
        window: width of the sliding attention window, None where attention is full.
    """

    qkv_bias: Callable[[Any], bool]
    o_bias: Callable[[Any], bool]
    mlp_bias: Callable[[Any], bool]
    qk_norm: bool
    window: Callable[[Any], int | None]


def _never(_: Any) -> bool:
    return False


def _attention_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _sliding_window(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=lambda config: bool(getattr(config, "mlp_bias", False)),
        qk_norm=False,
        window=lambda _: None,
    ),
    "MistralForCausalLM": Architecture(
        qkv_bias=_never, o_bias=_never, mlp_bias=_never, qk_norm=False, window=_sliding_window
    ),
    "Qwen2ForCausalLM": Architecture(
        qkv_bias=lambda _: True, o_bias=_never, mlp_bias=_never, qk_norm=False, window=_sliding_window
    ),
    "Qwen3ForCausalLM": Architecture(
        qkv_bias=_attention_bias, o_bias=_attention_bias, mlp_bias=_never, qk_norm=True, window=_sliding_window
    ),
}

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """Everything the decoder needs to know of a checkpoint besides its weights.

    Attributes:
        windows: for each layer, the width of its sliding attention window, or None for full attention.
        inv_freq: [head_dim / 2] float32, rotary frequencies, scaling included.
        rope_scale: factor on the rotary cosines and sines (1.0 but for yarn).
        max_positions: the longest context that the checkpoint allows, in tokens.
        torch_dtype: the dtype of the checkpoint, where it says so.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    inv_freq: torch.Tensor
    rope_scale: float
    max_positions: int
    torch_dtype: torch.dtype | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def base_shape(self) -> BaseShape:
        """What adapters may target."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        return BaseShape(
            num_layers=self.num_layers,
            sites={
                "q_proj": (hidden, self.q_size),
                "k_proj": (hidden, self.kv_size),
                "v_proj": (hidden, self.kv_size),
                "o_proj": (self.q_size, hidden),
                "gate_proj": (hidden, ffn),
                "up_proj": (hidden, ffn),
                "down_proj": (ffn, hidden),
            },
            model_sites={"lm_head": (hidden, self.vocab_size), "embed_tokens": (self.vocab_size, hidden)},
        )


def read_traits(config: PretrainedConfig) -> ModelTraits:
    """The traits of a checkpoint.

    Raises:
        UnsupportedModelError: for an architecture, activation or rotary scaling that is not served.
    """
    names = getattr(config, "architectures", None) or ["(none)"]
    name = names[0]
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}",
            param="architectures",
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {activation!r} is not supported; supported is 'silu'", param="hidden_act"
        )
    row = ARCHITECTURES[name]
    num_heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    inv_freq, rope_scale = _rotary(config, head_dim)
    return ModelTraits(
        architecture=name,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        rms_eps=float(config.rms_norm_eps),
        qkv_bias=row.qkv_bias(config),
        o_bias=row.o_bias(config),
        mlp_bias=row.mlp_bias(config),
        qk_norm=row.qk_norm,
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=_windows(config, row),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        max_positions=int(config.max_position_embeddings),
        torch_dtype=config.dtype if isinstance(getattr(config, "dtype", None), torch.dtype) else None,
    )


def _windows(config: Any, row: Architecture) -> tuple[int | None, ...]:
    """The window of each layer; ``layer_types``, where the configuration has it, says which layers slide."""
    window = row.window(config)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * int(config.num_hidden_layers)
    return tuple([window if kind == "sliding_attention" else None for kind in kinds])


def _rotary(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    """Rotary frequencies [head_dim / 2] and the factor on cosines and sines.

    transformers computes the scaled ones (Llama 3's wavelength bands, linear, YaRN); the plain ones are
    ``theta ** (-2 i / head_dim)``, https://arxiv.org/abs/2104.09864.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}", param="rope_parameters"
        )
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor is not supported; supported is 1.0", param="rope_parameters")
    if kind == "default":
        theta = float(parameters.get("rope_theta", 10000.0))
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / theta**exponent, 1.0
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scale)
