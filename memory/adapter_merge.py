"""Merged adapters: several plain LoRAs made into one by TIES or DARE, as PEFT's ``add_weighted_adapter`` does.

The A halves of a site are merged with each other and so are its B halves, adapter i with the factors
``sign(w_i s_i) * sqrt(|w_i s_i|)`` on A and ``sqrt(|w_i s_i|)`` on B, where w is its weight and s its scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraplex.memory.adapter_errors import AdapterChangedError, AdapterFileError, shown
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_spec import LAYER_SITES, MODEL_SITES, AdapterSpec, BaseShape, LowRankPair
from loraplex.memory.merge_recipe import PREFIX, MajoritySign, MergeRecipe
from loraplex.memory.tensor_checks import check_values

_Site = tuple[int | None, str]

KEY = "merged_adapters"
"""What errors name; the folders of the sources are no concern of who asks for a merge."""


def read_source(
    path: Path | str,
    shape: BaseShape,
    *,
    read: Callable[..., AdapterSpec] = read_adapter,
    expected: Callable[[str, int], str | None] | None = None,
    **options: Any,
) -> AdapterSpec:
    """Read an adapter, or read and merge what a recipe names; arguments and errors as in ``read_adapter``.

    ``read`` reads one adapter, by default from its folder. ``expected`` gives the content that a source of a merge must
    have, by path and revision, where it is known.

    Errors: AdapterChangedError where a source of a merge has another one.
    """
    if not str(path).startswith(PREFIX):
        return read(path, shape, **options)
    recipe = MergeRecipe.parse(str(path))
    specs = [read(source.path, shape, **options) for source in recipe.sources]
    for number, (source, spec) in enumerate(zip(recipe.sources, specs), start=1):
        wanted = None if expected is None else expected(source.path, source.revision)
        if wanted not in (None, spec.identity):
            message = f"adapter {number} of the merge: its files have changed since it was registered; load it again"
            raise AdapterChangedError(message, key=KEY)
    merged = merge_specs(specs, recipe)
    for pair in merged.pairs:
        for half, tensor in (("A", pair.a), ("B", pair.b)):
            check_values(f"merged lora_{half} of {_shown((pair.layer, pair.site))}", tensor, options.get("dtype"))
    return merged


def merge_specs(specs: Sequence[AdapterSpec], recipe: MergeRecipe) -> AdapterSpec:
    """Merge the adapters of a recipe, in its order.

    TIES (https://arxiv.org/abs/2306.01708) keeps the largest values of each tensor, elects a sign for each value and
    averages those that have it. DARE (https://arxiv.org/abs/2311.03099) keeps values at random and enlarges them by
    1 / density; the draws are seeded by the identity of the result, so equal recipes on equal adapters give equal
    results. Sites that only some adapters have are merged from those. One adapter alone is only weighted, as in PEFT.

    Returns pairs in float32 with a scale of 1. The identity is over the adapters' content, not over their paths.

    Errors: AdapterFileError for an adapter that is not plain LoRA, and for a site on which the ranks differ.
    """
    for number, spec in enumerate(specs, start=1):
        _check_plain(spec, number)
    identity = _identity(specs, recipe)
    generator = torch.Generator().manual_seed(draws_seed(identity))
    merge, found = _Merge(recipe, generator), [_by_site(spec) for spec in specs]
    pairs = tuple(merge.site(site, found) for site in _in_order(found))
    warnings = tuple(f"{shown(source.path)}: {w}" for spec, source in zip(specs, recipe.sources) for w in spec.warnings)
    return AdapterSpec(identity, "merged", pairs, warnings)


def draws_seed(identity: str) -> int:
    """Seed of the random draws of a merged adapter with this identity."""
    return int(identity[:15], 16)


def _identity(specs: Sequence[AdapterSpec], recipe: MergeRecipe) -> str:
    settings = {
        "strategy": recipe.strategy,
        "density": recipe.density,
        "majority_sign": recipe.majority_sign,
        "weights": [source.weight for source in recipe.sources],
    }
    content = hashlib.sha256("".join(spec.identity for spec in specs).encode()).digest()
    return adapter_identity("merged", content, settings)


def _check_plain(spec: AdapterSpec, number: int) -> None:
    if spec.kind != "lora" or spec.routing is not None or any(pair.gain is not None for pair in spec.pairs):
        raise AdapterFileError(
            f"adapter {number} of the merge: {spec.kind} cannot be merged; expected plain LoRA (peft_type LORA without "
            "use_dora and alora_invocation_tokens)",
            key=KEY,
        )


def _by_site(spec: AdapterSpec) -> dict[_Site, LowRankPair]:
    return {(pair.layer, pair.site): pair for pair in spec.pairs}


def _in_order(adapters: Sequence[Mapping[_Site, LowRankPair]]) -> list[_Site]:
    """Every site that an adapter has: by layer, then in image order, those of the whole model last."""
    order = (*LAYER_SITES, *MODEL_SITES)
    sites = {site for pairs in adapters for site in pairs}
    return sorted(sites, key=lambda site: (math.inf if site[0] is None else site[0], order.index(site[1])))


class _Merge:
    """Merges one site after another; the order matters to the random draws."""

    def __init__(self, recipe: MergeRecipe, generator: torch.Generator) -> None:
        self._recipe = recipe
        self._generator = generator

    def site(self, site: _Site, adapters: Sequence[Mapping[_Site, LowRankPair]]) -> LowRankPair:
        found: list[tuple[int, float, LowRankPair]] = []
        for number, (pairs, source) in enumerate(zip(adapters, self._recipe.sources), start=1):
            pair = pairs.get(site)
            if pair is not None:
                found.append((number, source.weight * pair.scale, pair))
        _check_ranks(site, [(number, pair) for number, _, pair in found])
        sizes = [math.sqrt(abs(factor)) for _, factor, _ in found]
        signed = [size if factor >= 0 else -size for size, (_, factor, _) in zip(sizes, found)]
        a = self._halves([pair.a for _, _, pair in found], signed)
        b = self._halves([pair.b for _, _, pair in found], sizes)
        return replace(found[0][2], a=a, b=b, scale=1.0)

    def _halves(self, tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """Merge equally shaped tensors into one, float32."""
        kept = torch.stack([self._prune(tensor.float()) for tensor in tensors])
        weighted = kept * torch.tensor(factors)[:, None, None]
        if self._recipe.strategy == "dare_linear" or len(self._recipe.sources) == 1:
            return weighted.sum(dim=0)
        agreeing = _agreeing(kept, self._recipe.majority_sign)
        return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)

    def _prune(self, tensor: torch.Tensor) -> torch.Tensor:
        density = self._recipe.density
        if density == 1 or len(self._recipe.sources) == 1:
            return tensor
        if self._recipe.strategy == "ties":
            kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
            return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)
        mask = torch.bernoulli(torch.full_like(tensor, density), generator=self._generator)
        return tensor * mask / density


def _check_ranks(site: _Site, found: Sequence[tuple[int, LowRankPair]]) -> None:
    rank = found[0][1].rank
    for number, pair in found:
        if pair.rank != rank:
            raise AdapterFileError(
                f"adapter {number} of the merge: rank {pair.rank} on {_shown(site)}, but adapter {found[0][0]} has "
                f"{rank} there; adapters are merged only where their ranks are equal",
                key=KEY,
            )


def _shown(site: _Site) -> str:
    layer, name = site
    return name if layer is None else f"{name} of layer {layer}"


def _agreeing(tensors: torch.Tensor, majority_sign: MajoritySign) -> torch.Tensor:
    """Which values of ``tensors [n, ...]`` have the sign that the n agree upon; at a draw it is plus."""
    signs = tensors.sign()
    votes = (tensors if majority_sign == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)
