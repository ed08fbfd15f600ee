"""Mixtures on the device: a GPU, or Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels import triton_runtime
from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_plan import UnitSet
from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.routed_lists import PADDING, DeviceRouted, RoutedLists, list_routed
from loraplex.kernels.router_plan import RoutedBatch, RoutedRows
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair, Router, Routing
from loraplex.memory.transfer import page_in

LAYER = 1


@pytest.fixture(scope="session", autouse=True)
def interpreted(interpreter: None, device: torch.device) -> None:
    """Without a GPU, nothing here runs unless the interpreter was chosen before Triton was first imported."""
    assert (device.type == "cuda") != triton_runtime.INTERPRETED


@pytest.fixture
def pool_device(device: torch.device) -> torch.device:
    return device


def send(
    lists: RoutedLists, device: torch.device, *, spare: int = 0, most: int | None = None, **facts: Any
) -> DeviceRouted:
    """Lists on the device, with room for so many more entries, and so many slots an entry."""
    capacity = len(lists.rows) + spare
    slots = most or lists.most
    sizes = dict.fromkeys(PADDING, capacity) | {"slot_starts": capacity + 1}
    found = {}
    for name, array in lists.arrays(slots).items():
        filler = PADDING[name]
        padded = np.full(sizes[name], array[-1] if filler is None else filler, dtype=array.dtype)
        padded[: len(array)] = array
        found[name] = torch.from_numpy(padded).to(device)
    facts = {"max_experts": lists.max_experts, "block_rows": lists.block_rows, **facts}
    return DeviceRouted.of(found, slots, **facts)


def on_host(parts: Sequence[RoutedRows], device: torch.device) -> RoutedBatch:
    """The same rows for the host's routing, which is proved against dense products."""
    adapters = dict.fromkeys(part.adapter for part in parts)
    units = [(adapter, expert) for adapter in adapters for expert in range(adapter.routing.num_experts)]
    return RoutedBatch(tuple(parts), UnitSet(tuple(units), device))


@dataclass
class Bench:
    """Adapters with experts and routers in layer 1 of a pool, whose descriptions are kept."""

    pool: Any
    table: AdapterTable = field(init=False)
    specs: dict[ResidentAdapter, AdapterSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = self.pool.widths
        self.table = AdapterTable(
            list(widths.groups.values()),
            [widths.lm_head, widths.embedding],
            num_layers=self.pool.num_layers,
            page_chunks=self.pool.arena.shape[2] // 128,
            device=self.pool.device,
        )

    @property
    def chunks(self) -> torch.Tensor:
        chunks: torch.Tensor = self.pool.chunks(LAYER)
        return chunks

    def load(
        self,
        *,
        experts: Sequence[str] = (),
        routers: Sequence[str] = (),
        ranks: Sequence[int] = (4,),
        num_experts: int = 4,
        gains: bool = False,
        tied: bool = False,
        **rules: Any,
    ) -> ResidentAdapter:
        """``ranks`` are those of the experts in turn; ``tied``: all routers' rows are alike."""
        pool = self.pool
        pairs = [self._pair(s, e, ranks[e % len(ranks)], gains) for s in experts for e in range(num_experts)]
        found = []
        for site in routers:
            weight = pool.draw(num_experts, self._router_width(site)).float() / 4
            found.append(Router(LAYER, site, weight[:1].expand_as(weight).contiguous() if tied else weight))
        routing = Routing(num_experts=num_experts, **rules)
        spec = AdapterSpec("id", "any", tuple(pairs), routers=tuple(found), routing=routing)
        image = build_image(spec, pool.num_layers, pool.arena.shape[2], pool.dtype)
        pages, pool._free = pool._free[: image.num_pages], pool._free[image.num_pages :]
        page_in(image, pool.arena, pages)
        chunks = pool.arena.shape[2] // 128
        adapter = ResidentAdapter(image.layout, pages, chunks, pool.num_layers, pool.num_pages, image.routing)
        self.specs[adapter] = spec
        self.table.add(adapter)
        return adapter

    def change(
        self, adapter: ResidentAdapter, site: str, expert: int, x: torch.Tensor, base: torch.Tensor, bias: Any = 0
    ) -> torch.Tensor:
        """What an expert adds to the base product of one row at a site, in float64."""
        pairs = [p for p in self.specs[adapter].pairs if (p.site, p.expert) == (site, expert)]
        if not pairs:
            return torch.zeros_like(base)
        (pair,) = pairs
        delta = pair.scale * (pair.b.to(x) @ (pair.a.to(x) @ x))
        return delta if pair.gain is None else pair.gain.to(x) * (base - bias + delta) - (base - bias)

    def weights(self, adapter: ResidentAdapter, site: str, x: torch.Tensor) -> dict[int, float]:
        """Chosen experts and their weights, by the words of ``Routing``."""
        spec = self.specs[adapter]
        rules = spec.routing
        routers = [router for router in spec.routers if router.site == site]
        if rules is None or not routers:
            return {}
        p = (routers[0].weight.to(x) @ x).softmax(0)
        if rules.temperature > 0:
            p = p / rules.temperature
        chosen: dict[int, float] = {}
        for e in sorted(range(rules.num_experts), key=lambda e: (-float(p[e]), e)):
            enough = rules.top_p is not None and sum(chosen.values()) > rules.top_p
            if len(chosen) == rules.limit or enough:
                break
            chosen[e] = float(p[e])
        total = sum(chosen.values()) if rules.renormalize else 1.0
        return {e: weight / total for e, weight in chosen.items()}

    def routed(self, parts: Sequence[RoutedRows], **options: Any) -> DeviceRouted:
        return send(list_routed(parts, self.table), self.pool.device, **options)

    def _pair(self, site: str, expert: int, rank: int, gains: bool) -> LowRankPair:
        in_features, out_features = self.pool.widths.features(site)
        a = self.pool.draw(rank, in_features) / in_features**0.5
        b = self.pool.draw(out_features, rank) / rank**0.5
        gain = 1 + self.pool.draw(out_features).float() / 4 if gains else None
        return LowRankPair(site, LAYER, a, b, 0.5 + 0.1 * rank, expert, gain)

    def _router_width(self, site: str) -> int:
        return int(self.pool.widths.hidden if site == "mlp" else self.pool.widths.features(site)[0])


@pytest.fixture
def make_bench(make_pool: Any, make_widths: Any) -> Callable[..., Bench]:
    """A bench over a pool of two layers; arguments are the dtype and the widths."""

    def make(dtype: torch.dtype = torch.float32, hidden: int = 100, kv: int = 64, ffn: int = 72) -> Bench:
        return Bench(make_pool(make_widths(hidden, kv, ffn), dtype, num_layers=2))

    return make


@pytest.fixture
def send_lists(device: torch.device) -> Callable[..., DeviceRouted]:
    return partial(send, device=device)


@pytest.fixture
def route_on_host(device: torch.device) -> Callable[[Sequence[RoutedRows]], RoutedBatch]:
    return partial(on_host, device=device)
