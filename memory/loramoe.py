"""LoRAMoE (https://arxiv.org/abs/2312.09979): on feed-forward linears all experts, weighed; on attention plain LoRA."""

from __future__ import annotations

from loraplex.memory.adapted_modules import Place, block_of
from loraplex.memory.linear_mixture import linear_mixture


def _allowed(place: Place) -> bool:
    return place.expert is None or block_of(place.site) == "mlp"


LORAMOE = linear_mixture(
    "loramoe",
    strategy="dense",
    allowed=_allowed,
    expected="loramoe.layers.N.mlp.SITE.experts.E.lora_A.weight or loramoe.layers.N.BLOCK.SITE.lora_A.weight",
)
