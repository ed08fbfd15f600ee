"""Adapters of random numbers: real descriptions for checks, and images that are quick to make for measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from costs import ALL_SITES, ATTENTION_SITES, FFN_SITES, ModelShape

from loraplex.memory.adapter_image import CHUNK, AdapterImage, plan_layout
from loraplex.memory.adapter_spec import FFN, AdapterSpec, LowRankPair, Router, Routing

EXPERTS = 8
TOP_K = 2

_SPREAD = 0.01
_BLOCK = 1_000_003  # no multiple of any row's width, so that rows differ

Draw = Callable[[int, int], torch.Tensor]


def nothing(rows: int, columns: int) -> torch.Tensor:
    """A matrix that has a shape alone."""
    return torch.empty((rows, columns), device="meta")


def numbers(seed: int) -> Draw:
    """Matrices of random numbers that every dtype holds exactly, so that an adapter's share of an output is about the
    base's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        exact: torch.Tensor = torch.randn((rows, columns), generator=generator) * max(rows, columns) ** -0.5
        return exact.to(torch.float8_e5m2).float()

    return draw


def lora(shape: ModelShape, rank: int, sites: Iterable[str] = ALL_SITES, draw: Draw = nothing) -> AdapterSpec:
    """LoRA on some linears of every layer."""
    return AdapterSpec(f"lora-r{rank}", "lora", _pairs(shape, rank, tuple(sites), (None,), draw))


def mixlora(shape: ModelShape, rank: int, draw: Draw = nothing) -> AdapterSpec:
    """LoRA on attention, 8 experts on the feed-forward network, the best two of them for each row."""
    pairs = _pairs(shape, rank, ATTENTION_SITES, (None,), draw) + _pairs(shape, rank, FFN_SITES, range(EXPERTS), draw)
    routers = tuple(Router(layer, FFN, draw(EXPERTS, shape.hidden)) for layer in range(shape.layers))
    routing = Routing("ffn", EXPERTS, TOP_K, renormalize=True)
    return AdapterSpec(f"mixlora-r{rank}", "mixlora", pairs, routers=routers, routing=routing)


def _pairs(
    shape: ModelShape, rank: int, sites: Iterable[str], experts: Iterable[int | None], draw: Draw
) -> tuple[LowRankPair, ...]:
    sites, experts = tuple(sites), tuple(experts)
    return tuple(
        LowRankPair(site, layer, draw(rank, shape.sites[site][0]), draw(shape.sites[site][1], rank), 1.0, expert)
        for layer in range(shape.layers)
        for expert in experts
        for site in sites
    )


def random_image(
    spec: AdapterSpec, num_layers: int, page_elems: int, dtype: torch.dtype, *, pin_memory: bool, seed: int = 0
) -> AdapterImage:
    """An image with the layout of a description and random numbers in every row, from one block of them used again
    and again."""
    layout = plan_layout(spec, num_layers, dtype)
    data = torch.empty((num_layers, layout.num_pages(page_elems), page_elems), dtype=dtype, pin_memory=pin_memory)
    generator = torch.Generator().manual_seed(seed)
    flat = data.view(-1)
    block = (torch.randn(min(_BLOCK, len(flat)), generator=generator) * _SPREAD).to(dtype)
    for at in range(0, len(flat), len(block)):
        part = flat[at : at + len(block)]
        part.copy_(block[: len(part)])
    chunks = data.view(num_layers, -1, CHUNK)
    for router in spec.routers:
        place = layout.mixture_of_layer(router.layer).routers[router.site]
        stop = place.start + place.num_experts * place.stride
        rows = chunks[router.layer].view(torch.float32)[place.start : stop]
        rows.copy_(torch.randn(rows.shape, generator=generator) * place.in_features**-0.5)
    return AdapterImage(spec.identity, spec.kind, layout, (data,), spec.routing)
