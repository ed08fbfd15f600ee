"""MeteoRA (https://arxiv.org/abs/2405.13053): embedded LoRAs, and on every adapted linear a gate that picks among them.

What was published is a whole model beside PEFT folders; this reads the one folder to which it is converted. The softmax
over the logits of the chosen is the softmax over all, divided by the sum of the chosen.
"""

from __future__ import annotations

from loraplex.memory.linear_mixture import linear_mixture

METEORA = linear_mixture(
    "meteora",
    strategy="top-k",
    allowed=lambda place: place.expert is not None,
    expected="meteora.layers.N.BLOCK.SITE.experts.E.lora_A.weight",
)
