"""Adapters in a pool, the table of them, and steps, for kernels on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels import triton_runtime
from loraplex.kernels.adapter_table import AdapterTable, TableCapacity
from loraplex.kernels.lora_launch import StepWork, add_entries
from loraplex.kernels.lora_plan import Segment
from loraplex.kernels.lora_rows import ResidentAdapter, SiteGroup
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists, list_entries
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair, Router, Routing
from loraplex.memory.transfer import page_in


@pytest.fixture(scope="session", autouse=True)
def interpreted(interpreter: None, device: torch.device) -> None:
    """Without a GPU, nothing here runs unless the interpreter was chosen before Triton was first imported."""
    assert (device.type == "cuda") != triton_runtime.INTERPRETED


@pytest.fixture
def pool_device(device: torch.device) -> torch.device:
    return device


def table_for(pool: Any, adapters: Sequence[ResidentAdapter] = (), capacity: TableCapacity | None = None) -> Any:
    """A table with these adapters of a pool."""
    table = AdapterTable(
        list(pool.widths.groups.values()),
        [pool.widths.lm_head, pool.widths.embedding],
        num_layers=pool.num_layers,
        page_chunks=pool.arena.shape[2] // 128,
        device=pool.device,
        capacity=capacity or TableCapacity(),
    )
    for adapter in dict.fromkeys(adapters):
        table.add(adapter)
    return table


@dataclass
class Step:
    """Segments of a step, and the kernels' entries for them.

    Attributes:
        capacity: of entries and of tiles; None: just enough.
        for_any: whether the launches are made for any step of that capacity, or for this one alone.
    """

    pool: Any
    segments: Sequence[Segment]
    capacity: tuple[int, int] | None = None
    for_any: bool = True
    block_rows: int | None = None
    table: AdapterTable = field(init=False)
    lists: EntryLists = field(init=False)
    entries: DeviceEntries = field(init=False)
    work: StepWork = field(init=False)

    def __post_init__(self) -> None:
        self.table = table_for(self.pool, [segment.adapter for segment in self.segments])
        units = [np.full(s.stop - s.start, self.table.unit_of(s.adapter)) for s in self.segments]
        rows = [np.arange(s.start, s.stop) for s in self.segments]
        none = np.empty(0, dtype=np.int64)
        self.lists = list_entries(
            np.concatenate([none, *units]), np.concatenate([none, *rows]), block_rows=self.block_rows
        )
        entries, tiles = self.capacity or (None, None)
        self.entries = DeviceEntries.copy_of(self.lists, self.pool.device, entries=entries, tiles=tiles)
        lists = None if self.for_any else self.lists
        self.work = StepWork.of(self.entries, self.table, self.pool.dtype, lists=lists)

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int | None, group: SiteGroup) -> torch.Tensor:
        add_entries(y, x, self.pool.chunks(layer), self.table, self.entries, self.work, layer, group)
        return y


@dataclass
class Mixtures:
    """Adapters with gains and experts in layer 0, whose descriptions are kept."""

    pool: Any
    specs: dict[ResidentAdapter, AdapterSpec] = field(default_factory=dict)

    def load(
        self,
        *,
        plain: Sequence[str] = (),
        experts: Sequence[str] = (),
        routers: Sequence[str] = (),
        ranks: Sequence[int] = (4,),
        num_experts: int = 4,
        gains: bool = False,
        **rules: Any,
    ) -> ResidentAdapter:
        """``ranks`` are those of the experts in turn, the first one that of plain pairs."""
        pool = self.pool
        pairs = [self._pair(site, None, ranks[0], gains) for site in plain]
        pairs += [self._pair(s, e, ranks[e % len(ranks)], gains) for s in experts for e in range(num_experts)]
        found = [Router(0, site, pool.draw(num_experts, self._router_width(site)).float()) for site in routers]
        routing = Routing(num_experts=num_experts, **rules) if rules else None
        spec = AdapterSpec("id", "any", tuple(pairs), routers=tuple(found), routing=routing)
        image = build_image(spec, pool.num_layers, pool.arena.shape[2], pool.dtype)
        pages, pool._free = pool._free[: image.num_pages], pool._free[image.num_pages :]
        page_in(image, pool.arena, pages)
        chunks = pool.arena.shape[2] // 128
        adapter = ResidentAdapter(image.layout, pages, chunks, pool.num_layers, pool.num_pages, image.routing)
        self.specs[adapter] = spec
        return adapter

    def change(
        self, adapter: ResidentAdapter, site: str, expert: int | None, x: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        """What a unit adds to the base product, without bias, of one row at a site; float64."""
        pairs = [p for p in self.specs[adapter].pairs if (p.site, p.expert) == (site, expert)]
        if not pairs:
            return torch.zeros_like(base)
        (pair,) = pairs
        delta = pair.scale * (pair.b.to(x) @ (pair.a.to(x) @ x))
        return delta if pair.gain is None else pair.gain.to(x) * (base + delta) - base

    def _pair(self, site: str, expert: int | None, rank: int, gains: bool) -> LowRankPair:
        in_features, out_features = self.pool.widths.features(site)
        a = self.pool.draw(rank, in_features) / in_features**0.5
        b = self.pool.draw(out_features, rank) / rank**0.5
        gain = 1 + self.pool.draw(out_features).float() / 4 if gains else None
        return LowRankPair(site, 0, a, b, 0.5 + 0.1 * rank, expert, gain)

    def _router_width(self, site: str) -> int:
        return int(self.pool.widths.hidden if site == "mlp" else self.pool.widths.features(site)[0])


@pytest.fixture
def make_table() -> Callable[..., AdapterTable]:
    return table_for


@pytest.fixture
def make_step() -> type[Step]:
    return Step


@pytest.fixture
def make_mixtures() -> type[Mixtures]:
    return Mixtures
