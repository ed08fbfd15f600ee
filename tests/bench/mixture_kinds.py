"""Adapters of each kind for the 0.37 B model, made in memory: random weights of the sizes that users have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from bench_model import LAYERS, LINEARS, RANK, VOCABULARY

from loraplex.memory.adapter_spec import FFN, AdapterSpec, LowRankPair, Router, Routing, TokenRoutes

EXPERTS = 8
TOP_K = 2
_ATTENTION = [name for name in LINEARS if name.startswith("self_attn.")]
_FEED_FORWARD = [name for name in LINEARS if name.startswith("mlp.")]
_HIDDEN = LINEARS["self_attn.q_proj"][0]


def lora(index: int) -> AdapterSpec:
    """Rank 16 on all linears."""
    made = _pairs(_generator(index), LINEARS, [None])
    return AdapterSpec(f"lora-{index}", "lora", made)


def mixlora(index: int) -> AdapterSpec:
    """8 experts of rank 16 on the feed-forward network, the two best of them, and LoRA of rank 16 on attention."""
    generator = _generator(index)
    pairs = _pairs(generator, _ATTENTION, [None]) + _pairs(generator, _FEED_FORWARD, range(EXPERTS))
    routers = [Router(layer, FFN, torch.randn((EXPERTS, _HIDDEN), generator=generator)) for layer in range(LAYERS)]
    routing = Routing("ffn", EXPERTS, TOP_K, renormalize=True)
    return AdapterSpec(f"mixlora-{index}", "mixlora", pairs, routers=tuple(routers), routing=routing)


def tokenwise(index: int) -> AdapterSpec:
    """8 experts of rank 16 on all linears, the two best of them for each token of the vocabulary."""
    generator = _generator(index)
    p, experts = torch.randn((VOCABULARY, EXPERTS), generator=generator).softmax(-1).topk(TOP_K)
    routes = TokenRoutes(experts.to(torch.int16), p / p.sum(-1, keepdim=True))
    routing = Routing("token", EXPERTS, TOP_K, renormalize=True)
    pairs = _pairs(generator, LINEARS, range(EXPERTS))
    return AdapterSpec(f"tokenwise-{index}", "tokenwise", pairs, routing=routing, token_routes=routes)


KINDS: dict[str, Callable[[int], AdapterSpec]] = {"lora": lora, "mixlora": mixlora, "tokenwise": tokenwise}


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(index)


def _pairs(generator: torch.Generator, names: Iterable[str], experts: Iterable[int | None]) -> tuple[LowRankPair, ...]:
    return tuple(
        LowRankPair(
            name.split(".")[1],
            layer,
            torch.randn((RANK, LINEARS[name][0]), generator=generator) * LINEARS[name][0] ** -0.5,
            torch.randn((LINEARS[name][1], RANK), generator=generator) * 0.02,
            1.0,
            expert,
        )
        for layer in range(LAYERS)
        for name in names
        for expert in list(experts)
    )
