"""Mixtures made of several plain LoRAs: each becomes one expert, on every linear that any of them adapts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from loraplex.memory.adapted_modules import block_of
from loraplex.memory.adapter_config import read_config, text_or_none
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import LAYER_SITES, AdapterSpec, BaseShape, LowRankPair

Linear: TypeAlias = tuple[int, str]
"""A layer and the name of a linear in it."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Plain LoRAs that become experts, in order.

    Attributes:
        paths: their folders.
        base_model: that the first of them names.
        pairs: for each, what it has on each linear.
    """

    paths: tuple[Path, ...]
    base_model: str | None
    pairs: tuple[dict[Linear, LowRankPair], ...]

    @classmethod
    def read(cls, paths: Sequence[Path], shape: BaseShape, *, allow_bin: bool = False) -> Experts:
        """Read them in full.

        Errors: AdapterFileError if one cannot be read, is not plain LoRA, or adapts more than the layers' linears.
        """
        specs = [read_adapter(path, shape, allow_bin=allow_bin) for path in paths]
        pairs = tuple(_by_linear(spec, path) for spec, path in zip(specs, paths))
        return cls(tuple(paths), text_or_none(read_config(paths[0]), "base_model_name_or_path"), pairs)

    @property
    def linears(self) -> list[Linear]:
        """Every linear that any of them adapts, by layer and then in image order."""
        found = {linear for pairs in self.pairs for linear in pairs}
        return sorted(found, key=lambda linear: (linear[0], LAYER_SITES.index(linear[1])))

    def config(self, top_k: int) -> dict[str, object]:
        """The keys that a mixture of any kind has. Errors: AdapterFileError if top_k is out of range."""
        num_experts = len(self.paths)
        if not 1 <= top_k <= num_experts:
            raise AdapterFileError(
                f"top_k: expected 1 to {num_experts}, the number of adapters, got {top_k}", key="top_k"
            )
        pairs = {(linear, e): self._pair(linear, e) for linear in self.linears for e in range(num_experts)}
        rank, rank_pattern = _with_exceptions({place: pair.rank for place, pair in pairs.items()})
        alpha, alpha_pattern = _with_exceptions({place: pair.scale * pair.rank for place, pair in pairs.items()})
        return {
            "base_model_name_or_path": self.base_model,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "num_experts": num_experts,
            "top_k": top_k,
        }

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """``PREFIX.layers.L.BLOCK.P.experts.E.lora_A.weight [rank, in]`` and ``lora_B.weight [out, rank]``.

        An expert that lacks a linear gets zeros there.
        """
        tensors: dict[str, torch.Tensor] = {}
        for linear in self.linears:
            for expert in range(len(self.paths)):
                pair = self._pair(linear, expert)
                key = f"{linear_key(prefix, linear)}.experts.{expert}"
                tensors |= {f"{key}.lora_A.weight": pair.a, f"{key}.lora_B.weight": pair.b}
        return tensors

    def _pair(self, linear: Linear, expert: int) -> LowRankPair:
        own = self.pairs[expert]
        if linear in own:
            return own[linear]
        like = next(pairs[linear] for pairs in self.pairs if linear in pairs)
        first = next(iter(own.values()))
        a, b = like.a.new_zeros((first.rank, like.a.shape[1])), like.b.new_zeros((like.b.shape[0], first.rank))
        return replace(like, a=a, b=b, scale=first.scale)


def linear_key(prefix: str, linear: Linear) -> str:
    """What the keys of a linear's tensors begin with."""
    layer, site = linear
    return f"{prefix}.layers.{layer}.{block_of(site)}.{site}"


def _with_exceptions(values: Mapping[tuple[Linear, int], float]) -> tuple[float, dict[str, float]]:
    """The most common value, and a pattern for each expert, or each of its linears, that has another."""
    common = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, float] = {}
    for expert in sorted({expert for _, expert in values}):
        own = {linear: value for (linear, e), value in values.items() if e == expert}
        if len(set(own.values())) == 1:
            own_patterns = {f"experts.{expert}": next(iter(own.values()))}
        else:
            own_patterns = {f"{linear_key('model', linear)}.experts.{expert}": value for linear, value in own.items()}
        patterns |= {key: value for key, value in own_patterns.items() if value != common}
    return common, patterns


def _by_linear(spec: AdapterSpec, path: Path) -> dict[Linear, LowRankPair]:
    name = shown(str(path))
    if spec.kind != "lora":
        raise AdapterFileError(f"{name}: {spec.kind} cannot be an expert; expected plain LoRA", key=str(path))
    pairs: dict[Linear, LowRankPair] = {}
    for pair in spec.pairs:
        if pair.layer is None:
            raise AdapterFileError(
                f"{name}: adapts {pair.site}, which experts cannot; expected {', '.join(LAYER_SITES)}", key=str(path)
            )
        pairs[pair.layer, pair.site] = pair
    return pairs
