"""MixLoRA (https://arxiv.org/abs/2404.15159): experts in the feed-forward networks, one router per layer.

Three generations of names have been published, and all are read::

    mixlora.layers.L.mlp.moe_gate.weight      mixlora.layers.L.gate.weight
    mixlora.layers.L.mlp.P.experts.E          mixlora.layers.L.experts.E.P      mixlora.layers.L.mlp.experts.E.P

where P is a site or, in the oldest, w1_proj (gate), w3_proj (up) or w2_proj (down).
"""

from __future__ import annotations

import re

from loraplex.memory.adapted_modules import NUMBER, Place, layer_place
from loraplex.memory.adapter_spec import FFN
from loraplex.memory.mixture_family import MixtureFamily, RouterPlace

OLDEST_NAMES = {"w1_proj": "gate_proj", "w3_proj": "up_proj", "w2_proj": "down_proj"}

_LAYER = rf"mixlora\.layers\.{NUMBER}"
_ATTENTION = re.compile(rf"{_LAYER}\.self_attn\.(\w+)")
_EXPERT_LAST = re.compile(rf"{_LAYER}\.mlp\.(\w+)\.experts\.{NUMBER}")
_EXPERT_FIRST = re.compile(rf"{_LAYER}\.(?:mlp\.)?experts\.{NUMBER}\.(\w+)")
_ROUTER = re.compile(rf"{_LAYER}\.(?:mlp\.moe_gate|gate)\.weight")


def _place(stem: str) -> Place | None:
    if match := _ATTENTION.fullmatch(stem):
        return layer_place(match[1], "self_attn", match[2])
    if match := _EXPERT_LAST.fullmatch(stem):
        layer, name, expert = match.groups()
    elif match := _EXPERT_FIRST.fullmatch(stem):
        layer, expert, name = match.groups()
    else:
        return None
    return layer_place(layer, "mlp", OLDEST_NAMES.get(name, name), expert)


def _router_place(key: str) -> RouterPlace | None:
    match = _ROUTER.fullmatch(key)
    return None if match is None else (int(match[1]), FFN)


MIXLORA = MixtureFamily(
    kind="mixlora",
    scope="ffn",
    strategies={
        "mixlora": "top-k",
        "mixtral": "top-k",
        "mixlora-dynamic": "dynamic",
        "mixlora-switch": "switch",
        "switch": "switch",
    },
    default_strategy=None,
    allow_dora=True,
    place_of=_place,
    router_of=_router_place,
    router_key=lambda place: f"mixlora.layers.{place[0]}.mlp.moe_gate.weight",
    expected="mixlora.layers.N.mlp.moe_gate.weight, mixlora.layers.N.self_attn.SITE.lora_A.weight or "
    "mixlora.layers.N.mlp.SITE.experts.E.lora_A.weight, with lora_B.weight or lora_magnitude_vector likewise",
    aliases=OLDEST_NAMES,
)
