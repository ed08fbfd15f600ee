"""MoLA (https://arxiv.org/abs/2402.08562): top-k experts on every adapted linear, each with a router of its own."""

from __future__ import annotations

from loraplex.memory.linear_mixture import linear_mixture

MOLA = linear_mixture(
    "mola",
    strategy="top-k",
    allowed=lambda _: True,
    expected="mola.layers.N.BLOCK.SITE.experts.E.lora_A.weight or mola.layers.N.BLOCK.SITE.lora_A.weight",
)
