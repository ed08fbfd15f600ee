"""Token-wise routing, after LoRA-Switch (https://arxiv.org/abs/2405.17741): one choice per token, for all linears."""

from __future__ import annotations

import re

from loraplex.memory.adapted_modules import NUMBER, Place, layer_place
from loraplex.memory.mixture_family import WHOLE_MODEL, MixtureFamily, RouterPlace

ROUTER_KEY = "tokenwise.router.weight"

_EXPERT = re.compile(rf"tokenwise\.layers\.{NUMBER}\.(self_attn|mlp)\.(\w+)\.experts\.{NUMBER}")


def _place(stem: str) -> Place | None:
    match = _EXPERT.fullmatch(stem)
    return None if match is None else layer_place(match[1], match[2], match[3], match[4])


def _router_place(key: str) -> RouterPlace | None:
    return (None, WHOLE_MODEL) if key == ROUTER_KEY else None


TOKENWISE = MixtureFamily(
    kind="tokenwise",
    scope="token",
    strategies={"tokenwise": "top-k"},
    default_strategy="top-k",
    allow_dora=False,
    place_of=_place,
    router_of=_router_place,
    router_key=lambda _: ROUTER_KEY,
    expected=f"{ROUTER_KEY} or tokenwise.layers.N.BLOCK.SITE.experts.E.lora_A.weight and lora_B.weight",
    aliases={},
)
