"""Names of mixtures that have experts and a router of their own on each adapted linear."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from loraplex.memory.adapted_modules import NUMBER, Place, block_of, layer_place
from loraplex.memory.mixture_config import Strategy
from loraplex.memory.mixture_family import MixtureFamily, RouterPlace


def linear_mixture(kind: str, *, strategy: Strategy, allowed: Callable[[Place], bool], expected: str) -> MixtureFamily:
    """The family whose keys start with its kind, and whose ``routing_strategy``, if any, is its kind.

    Args:
        kind: as in ``AdapterSpec``.
        strategy: how its experts are chosen.
        allowed: whether the family has pairs at a place.
        expected: where it has them, for messages.
    """
    linear = rf"{kind}\.layers\.{NUMBER}\.(self_attn|mlp)\.(\w+)"
    module = re.compile(rf"{linear}(?:\.experts\.{NUMBER})?")
    router = re.compile(rf"{linear}\.moe_gate\.weight")

    def place_of(stem: str) -> Place | None:
        match = module.fullmatch(stem)
        place = None if match is None else layer_place(match[1], match[2], match[3], match[4])
        return place if place is not None and allowed(place) else None

    def router_of(key: str) -> RouterPlace | None:
        match = router.fullmatch(key)
        place = None if match is None else layer_place(match[1], match[2], match[3])
        return None if place is None else (place.layer, place.site)

    def router_key(place: RouterPlace) -> str:
        layer, site = place
        return f"{kind}.layers.{layer}.{block_of(site)}.{site}.moe_gate.weight"

    strategies: Mapping[str, Strategy] = {kind: strategy}
    return MixtureFamily(
        kind=kind,
        scope="linear",
        strategies=strategies,
        default_strategy=strategy,
        allow_dora=False,
        place_of=place_of,
        router_of=router_of,
        router_key=router_key,
        expected=f"{kind}.layers.N.BLOCK.SITE.moe_gate.weight or, with lora_B.weight likewise, {expected}",
        aliases={},
    )
