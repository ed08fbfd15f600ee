"""What a family of adapters must be able to do, whatever its files look like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.memory.adapter_config import RawConfig
from loraplex.memory.adapter_spec import LAYER_SITES, MODEL_SITES, AdapterSpec, BaseShape, BaseWeights
from loraplex.memory.tensor_file import TensorFile, TensorListing


@dataclass(frozen=True, slots=True)
class Outline:
    """What a folder says of itself without its weights being read.

    Attributes:
        kind: as in ``AdapterSpec``.
        settings: what matters at inference in its configuration: see ``adapter_identity``.
        rank: the largest of any pair.
        targets: adapted sites in image order.
        num_experts: 0 for an adapter without experts.
        top_k: how many of them a token takes, 0 where that is not a fixed choice.
        routing: "top-k", "dynamic", "switch", "dense", or "" without experts.
        scope: as in ``Routing``; None without experts.
        invocation: as in ``AdapterSpec``.
    """

    kind: str
    settings: dict[str, object]
    rank: int
    targets: tuple[str, ...]
    num_experts: int = 0
    top_k: int = 0
    routing: str = ""
    scope: str | None = None
    invocation: tuple[int, ...] = ()


class FamilyReader(Protocol):
    """Checks a folder's content against the served base and describes it neutrally.

    Errors: AdapterFileError if it breaks a rule. ``dtype`` and ``base_weights`` as in ``read_adapter``.
    """

    def __call__(
        self,
        raw: RawConfig,
        file: TensorFile,
        *,
        shape: BaseShape,
        dtype: torch.dtype | None = None,
        base_weights: BaseWeights | None = None,
    ) -> AdapterSpec: ...


class FamilyOutline(Protocol):
    """Outlines a folder without its weights; AdapterFileError if that suffices to see that it breaks a rule."""

    def __call__(self, raw: RawConfig, listing: TensorListing) -> Outline: ...


@dataclass(frozen=True, slots=True)
class Family:
    """One family of adapters: how its folders are read and outlined."""

    read: FamilyReader
    outline: FamilyOutline


def in_image_order(names: Iterable[str]) -> tuple[str, ...]:
    """The sites among these names, each once."""
    present = set(names)
    return tuple(site for site in (*LAYER_SITES, *MODEL_SITES) if site in present)


def missing_targets(named: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """A warning for each site that ``target_modules`` names and no tensor adapts."""
    adapted = set(present)
    return tuple(
        f"target_modules names {site}, but there are no tensors for it"
        for site in in_image_order(named)
        if site not in adapted
    )
