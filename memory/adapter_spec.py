"""The neutral description of an adapter: what memory and kernels know of it, whatever file format it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

LAYER_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Adaptable linears of a decoder layer, in image order; those that read the same input stand together."""

MODEL_GROUPS = (("lm_head",), ("embed_tokens",))
"""Adaptable matrices that belong to no layer, likewise."""

LAYER_SITES = tuple(site for group in LAYER_GROUPS for site in group)
MODEL_SITES = tuple(site for group in MODEL_GROUPS for site in group)


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What the served base model offers to adapters.

    Attributes:
        num_layers: decoder layers.
        sites: (in_features, out_features) of every adaptable linear of a layer, by site name.
        model_sites: likewise for ``lm_head`` (hidden, vocabulary) and ``embed_tokens`` (vocabulary, hidden).
    """

    num_layers: int
    sites: Mapping[str, tuple[int, int]]
    model_sites: Mapping[str, tuple[int, int]]

    def features(self, site: str) -> tuple[int, int]:
        """(in_features, out_features) of a site; KeyError for a site that the base does not have."""
        return self.sites[site] if site in self.sites else self.model_sites[site]


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """One adapted matrix: the update of ``W [out, in]`` is ``scale * b @ a``.

    Attributes:
        site: a name of ``LAYER_SITES`` or ``MODEL_SITES``.
        layer: decoder layer, or None for a model site.
        a: [rank, in_features], any floating dtype.
        b: [out_features, rank], any floating dtype.
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA.
    """

    site: str
    layer: int | None
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as read and verified.

    Attributes:
        identity: hex digest over the content of its tensors' file and its configuration.
        kind: "lora".
        pairs: every adapted matrix, at most one per (layer, site).
        warnings: what the operator should know although the adapter is served.
    """

    identity: str
    kind: str
    pairs: tuple[LowRankPair, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> int:
        """The largest rank of any pair."""
        return max(pair.rank for pair in self.pairs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the sites adapted anywhere, in image order."""
        present = {pair.site for pair in self.pairs}
        return tuple(site for site in (*LAYER_SITES, *MODEL_SITES) if site in present)
