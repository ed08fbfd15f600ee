"""The base's own weights as adapter readers need them: to compare copies, for DoRA's norms, for token-wise routes."""

from __future__ import annotations

from pathlib import Path

import torch

from loraplex.kernels.norms import rms_norm_reference
from loraplex.server.traits import ModelTraits
from loraplex.server.weights import EMBEDDING, LM_HEAD, CheckpointReader


class BaseMatrices:
    """A ``BaseWeights`` over a checkpoint folder. Matrices are read again when asked for; any thread may ask.

    Args:
        folder: of the checkpoint.
        traits: of the model.
        dtype: that the model is served in.
    """

    def __init__(self, folder: Path, traits: ModelTraits, dtype: torch.dtype) -> None:
        self._reader = CheckpointReader(folder)
        self._traits = traits
        self._dtype = dtype

    def matrix(self, site: str, layer: int | None = None) -> torch.Tensor:
        """[out, in] of a linear of a layer; [vocabulary, hidden] of ``embed_tokens`` or ``lm_head``; as stored."""
        return self._reader.read(*self._name_and_shape(site, layer))

    def first_inputs(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, hidden] in the served dtype: what the first layer's q, k and v read for these token ids."""
        traits = self._traits
        name, shape = self._name_and_shape("embed_tokens", None)
        rows = self._reader.read(name, shape, slice(start, stop)).to(self._dtype)
        weight = self._reader.read("model.layers.0.input_layernorm.weight", (traits.hidden_size,)).to(self._dtype)
        return rms_norm_reference(rows, weight, traits.rms_eps)

    def _name_and_shape(self, site: str, layer: int | None) -> tuple[str, tuple[int, int]]:
        traits = self._traits
        if layer is None:
            name = LM_HEAD if site == "lm_head" and not traits.tied_embeddings else EMBEDDING
            return name, (traits.vocab_size, traits.hidden_size)
        in_features, out_features = traits.base_shape.sites[site]
        block = "self_attn" if site in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        return f"model.layers.{layer}.{block}.{site}.weight", (out_features, in_features)
