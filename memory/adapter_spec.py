"""The neutral description of an adapter: what memory and kernels know of it, whatever file format it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

LAYER_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Adaptable linears of a decoder layer, in image order; those that read the same input stand together."""

MODEL_GROUPS = (("lm_head",), ("embed_tokens",))
"""Adaptable matrices that belong to no layer, likewise."""

LAYER_SITES = tuple(site for group in LAYER_GROUPS for site in group)
MODEL_SITES = tuple(site for group in MODEL_GROUPS for site in group)

FFN = "mlp"
"""Where the router of a mixture of whole feed-forward networks stands: it reads what gate_proj and up_proj read."""

RoutingScope = Literal["ffn", "linear", "token"]


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


class BaseWeights(Protocol):
    """The served base's own weights, read when a reader asks; any thread may ask."""

    def matrix(self, site: str, layer: int | None = None) -> torch.Tensor:
        """[out, in] of a linear of a layer; [vocabulary, hidden] of ``lm_head`` or ``embed_tokens``, without a layer.

        On the host, in the checkpoint's dtype.
        """

    def first_inputs(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, hidden] in the served dtype: what the first layer's q, k and v read for these token ids."""


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """One low-rank update: of ``W [out, in]`` by ``scale * b @ a``, for every row or for rows routed to one expert.

    Attributes:
        site: a name of ``LAYER_SITES`` or ``MODEL_SITES``.
        layer: decoder layer, or None for a model site.
        a: [rank, in_features], any floating dtype.
        b: [out_features, rank], any floating dtype.
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA.
        expert: that it belongs to, from 0; None for a pair that every row takes.
        gain: DoRA's factor on each output, [out_features] float32, ``m / ||W + scale b a||``:
            ``y = gain * (W x + scale b a x) + bias``, https://arxiv.org/abs/2402.09353. None is 1.
    """

    site: str
    layer: int | None
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    expert: int | None = None
    gain: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Router:
    """Scores experts: ``logits = weight @ x``, in float32.

    Attributes:
        layer: decoder layer.
        site: ``FFN``, whose experts are whole feed-forward networks, or the linear whose input it reads and whose
            pairs it weighs.
        weight: [num_experts, in_features], any floating dtype.
    """

    layer: int
    site: str
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """How scores become a choice of experts and their weights.

    ``p = softmax(logits)``, divided by ``temperature`` if that is above 0. Experts are chosen from the largest p on,
    the lowest index first among equals, at most ``limit`` of them, and with ``top_p`` no more once their sum exceeds
    it. Their weights are their p, divided by the sum of those chosen if ``renormalize``.

    Attributes:
        scope: what an expert is: a whole feed-forward network, the pairs of one linear (each with a router of its
            own), or the pairs of all linears of all layers, chosen once for each token.
        num_experts: of every router.
        limit: 1 to num_experts.
        activation: of the experts' feed-forward networks, a name of ``transformers.activations.ACT2FN`` that is one of
            silu, gelu, gelu_new, gelu_pytorch_tanh, relu; None is the base's.
    """

    scope: RoutingScope
    num_experts: int
    limit: int
    renormalize: bool
    top_p: float | None = None
    temperature: float = 0.0
    activation: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRoutes:
    """The choice of experts for every token of the vocabulary, where it depends on the token alone.

    Attributes:
        experts: [vocabulary, limit] int16, best first.
        weights: [vocabulary, limit] float32.
    """

    experts: torch.Tensor
    weights: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.experts.nbytes + self.weights.nbytes


@dataclass(frozen=True, slots=True)
class SpecValues:
    """All values of an adapter as one tensor, where its own tensors are views of that.

    Attributes:
        structure: one object for all adapters whose tensors lie at the same positions of ``flat``, and which differ in
            nothing but values, identities and warnings.
        flat: [n], as stored.
    """

    structure: object
    flat: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as read and verified.

    Attributes:
        identity: hex digest over the content of its tensors' file and its configuration.
        kind: "lora", "dora", "alora", "mixlora", "mola", "loramoe", "meteora", "tokenwise" or "merged".
        pairs: every low-rank pair, at most one per (layer, site, expert).
        warnings: what the operator should know although the adapter is served.
        routers: one per layer and site that has experts; none where the scope is "token".
        routing: how they choose; None for an adapter without experts.
        token_routes: where the scope is "token".
        invocation: activated LoRA: the adapter acts from the start of the last occurrence of these tokens in the prompt
            on, and not at all where there is none. Empty: it acts on every token.
        values: where its reader knows of others that are alike.
    """

    identity: str
    kind: str
    pairs: Sequence[LowRankPair]
    warnings: tuple[str, ...] = field(default=())
    routers: tuple[Router, ...] = field(default=())
    routing: Routing | None = None
    token_routes: TokenRoutes | None = None
    invocation: tuple[int, ...] = field(default=())
    values: SpecValues | None = field(default=None, repr=False, compare=False)

    @property
    def rank(self) -> int:
        """The largest rank of any pair."""
        return max(pair.rank for pair in self.pairs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the sites adapted anywhere, in image order."""
        present = {pair.site for pair in self.pairs}
        return tuple(site for site in (*LAYER_SITES, *MODEL_SITES) if site in present)

    @property
    def num_experts(self) -> int:
        """0 for an adapter without experts."""
        return self.routing.num_experts if self.routing else 0

    def first_kv_layer(self, num_layers: int) -> int:
        """The first layer whose keys and values may differ from the base's; ``num_layers`` where none may.

        A layer's keys and values follow from its k_proj and v_proj and from what enters the layer. So an update of
        those acts from its own layer on, one of the layer's other linears from the next layer on, one of
        ``embed_tokens`` from the first on, and one of ``lm_head`` nowhere.
        """
        places = [(pair.site, pair.layer) for pair in self.pairs]
        places += [(router.site, router.layer) for router in self.routers]
        return min((_first_kv_layer(site, layer, num_layers) for site, layer in places), default=num_layers)


def _first_kv_layer(site: str, layer: int | None, num_layers: int) -> int:
    if layer is None:
        return 0 if site == "embed_tokens" else num_layers
    return min(layer if site in ("k_proj", "v_proj") else layer + 1, num_layers)
