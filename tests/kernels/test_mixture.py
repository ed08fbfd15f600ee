"""Mixtures, gains and mixes in one batch against dense products written out row by row in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loraplex.kernels import ops
from loraplex.kernels.lora_plan import AdapterBatch, EntryBatch, Segment, UnitSet, sort_entries
from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.router_plan import RoutedBatch, RoutedRows
from loraplex.kernels.step_adapters import RouteLog, StepAdapters
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair, Router, Routing
from loraplex.memory.transfer import page_in

CPU = torch.device("cpu")
LAYER = 1
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")

TOP_2 = {"limit": 2, "renormalize": True}
SWITCH = {"limit": 1, "renormalize": False}
DYNAMIC = {"limit": 4, "renormalize": False, "top_p": 0.6}
COOLED = {"limit": 4, "renormalize": False, "top_p": 0.6, "temperature": 1.7}
DENSE = {"limit": 4, "renormalize": False}


@dataclass
class Bench:
    """An arena with adapters whose descriptions are kept."""

    pool: Any
    specs: dict[ResidentAdapter, AdapterSpec] = field(default_factory=dict)

    def load(
        self,
        *,
        plain: Sequence[str] = (),
        experts: Sequence[str] = (),
        routers: Sequence[str] = (),
        rank: int = 4,
        num_experts: int = 4,
        gains: bool = False,
        **routing: Any,
    ) -> ResidentAdapter:
        pool = self.pool
        pairs = [self._pair(site, None, rank, gains) for site in plain]
        pairs += [self._pair(site, e, rank, gains) for site in experts for e in range(num_experts)]
        found = [
            Router(LAYER, site, pool.normal(num_experts, pool.widths.hidden if site == "mlp" else self._in(site)) / 4)
            for site in routers
        ]
        rules = Routing(num_experts=num_experts, **routing) if experts else None
        spec = AdapterSpec("id", "any", tuple(pairs), routers=tuple(found), routing=rules)
        image = build_image(spec, pool.num_layers, pool.arena.shape[2], pool.dtype)
        pages, pool._free = pool._free[: image.num_pages], pool._free[image.num_pages :]
        page_in(image, pool.arena, pages)
        page_chunks = pool.arena.shape[2] // 128
        adapter = ResidentAdapter(
            image.layout, pages, page_chunks, pool.num_layers, pool.num_pages, image.routing, image.token_routes
        )
        self.specs[adapter] = spec
        return adapter

    def _in(self, site: str) -> int:
        return int(self.pool.widths.features(site)[0])

    def _pair(self, site: str, expert: int | None, rank: int, gains: bool) -> LowRankPair:
        in_features, out_features = self.pool.widths.features(site)
        a = self.pool.normal(rank, in_features) / in_features**0.5
        b = self.pool.normal(out_features, rank) / rank**0.5
        gain = 1 + self.pool.normal(out_features).float() / 4 if gains else None
        return LowRankPair(site, LAYER, a, b, 0.5 + 0.1 * rank, expert, gain)

    def change(self, adapter: ResidentAdapter, site: str, expert: int | None, x: Any, base: Any, bias: Any) -> Any:
        """What an adapter or expert adds to ``base = W x + bias`` at a site, float64."""
        pairs = [p for p in self.specs[adapter].pairs if (p.site, p.expert) == (site, expert)]
        if not pairs:
            return torch.zeros_like(base)
        pair = pairs[0]
        delta = pair.scale * (pair.b.double() @ (pair.a.double() @ x))
        if pair.gain is None:
            return delta
        pure = base - bias
        return pair.gain.double() * (pure + delta) - pure

    def weights(self, adapter: ResidentAdapter, site: str, x: Any) -> dict[int, float]:
        """Chosen experts and their weights, by the words of ``Routing``."""
        spec = self.specs[adapter]
        rules = spec.routing
        routers = [router for router in spec.routers if router.site == site]
        if rules is None or not routers:
            return {}
        p = (routers[0].weight.double() @ x).softmax(0)
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


def expected_linear(bench: Bench, site: str, x: Any, base: Any, bias: Any, adapters: Any) -> Any:
    """[out] of one row at one linear: ``adapters`` as (adapter, weight)."""
    y = base.clone()
    for adapter, weight in adapters:
        y += weight * bench.change(adapter, site, None, x, base, bias)
        for e, p in bench.weights(adapter, site, x).items():
            y += weight * p * bench.change(adapter, site, e, x, base, bias)
    return y


def arrange(rows: list[list[tuple[ResidentAdapter, float]]]) -> tuple[Any, ...]:
    """The batches of these rows: rows of one adapter must stand together behind the others."""
    segments: list[Segment] = []
    listed: list[tuple[int, ResidentAdapter, float]] = []
    routed: dict[str, dict[tuple[ResidentAdapter, float], list[int]]] = {"linear": {}, "ffn": {}}
    for row, adapters in enumerate(rows):
        if len(adapters) == 1 and adapters[0][1] == 1:
            adapter = adapters[0][0]
            if segments and segments[-1].adapter is adapter:
                segments[-1] = Segment(adapter, segments[-1].start, row + 1)
            else:
                segments.append(Segment(adapter, row, row + 1))
        else:
            listed += [(row, adapter, weight) for adapter, weight in adapters]
        for adapter, weight in adapters:
            if adapter.routing is not None:
                routed[adapter.routing.scope].setdefault((adapter, weight), []).append(row)
    direct = AdapterBatch(segments, CPU) if segments else None
    batches = {
        scope: routed_batch([RoutedRows(a, np.array(r), w) for (a, w), r in some.items()]) if some else None
        for scope, some in routed.items()
    }
    return direct, _list(listed), batches["linear"], batches["ffn"]


def routed_batch(parts: list[RoutedRows]) -> RoutedBatch:
    adapters = dict.fromkeys(part.adapter for part in parts)
    units = [(adapter, expert) for adapter in adapters for expert in range(adapter.routing.num_experts)]
    return RoutedBatch(tuple(parts), UnitSet(tuple(units), CPU))


def _list(listed: list[tuple[int, ResidentAdapter, float]]) -> EntryBatch | None:
    if not listed:
        return None
    adapters = list(dict.fromkeys(adapter for _, adapter, _ in listed))
    entries, _ = sort_entries(
        np.array([adapters.index(adapter) for _, adapter, _ in listed]),
        np.array([row for row, _, _ in listed]),
        np.array([weight for _, _, weight in listed], dtype=np.float32),
        len(adapters),
    )
    return EntryBatch(UnitSet(tuple((adapter, None) for adapter in adapters), CPU), entries)


def check_linears(bench: Bench, rows: list[list[tuple[ResidentAdapter, float]]], assert_close: Any) -> None:
    pool = bench.pool
    step = StepAdapters(*arrange(rows))
    for group in pool.widths.groups.values():
        x, y = pool.normal(len(rows), group.in_features), pool.normal(len(rows), sum(group.out_features))
        bias = pool.normal(sum(group.out_features))
        expected = y.double()
        for row, adapters in enumerate(rows):
            at = 0
            for site, width in zip(group.sites, group.out_features):
                here = (row, slice(at, at + width))
                expected[here] = expected_linear(
                    bench, site, x[row].double(), y[here].double(), bias[here[1]].double(), adapters
                )
                at += width
        step.add(y, x, pool.chunks(LAYER), LAYER, group, bias)
        assert_close(y, expected)


@pytest.fixture
def bench(make_pool: Any, make_widths: Any) -> Bench:
    return Bench(make_pool(make_widths(100, 64, 136), torch.float32, num_layers=2))


def spread(adapters: Sequence[ResidentAdapter], lengths: Sequence[int]) -> list[list[tuple[ResidentAdapter, float]]]:
    """Short segments first, as in a step."""
    order = sorted(zip(adapters, lengths), key=lambda item: item[1] > 2)
    return [[(adapter, 1.0)] for adapter, length in order for _ in range(length)]


@pytest.mark.parametrize("lengths", [(1, 2, 1), (7, 9, 3), (1, 8, 2)], ids=str)
def test_gains_of_some_adapters_leave_the_others_alone(bench: Bench, assert_close: Any, lengths: Any) -> None:
    adapters = [
        bench.load(plain=(*ATTENTION, *FFN), rank=3, gains=True),
        bench.load(plain=(*ATTENTION, *FFN), rank=5),
        bench.load(plain=("k_proj", "up_proj"), rank=2, gains=True),
    ]
    check_linears(bench, [[], *spread(adapters, lengths)], assert_close)


@pytest.mark.parametrize("rules", [TOP_2, SWITCH, DYNAMIC, COOLED, DENSE], ids=str)
@pytest.mark.parametrize("lengths", [(1, 2, 1), (9, 1, 12)], ids=str)
def test_linears_with_routers_of_their_own(bench: Bench, assert_close: Any, rules: Any, lengths: Any) -> None:
    sites = ("q_proj", "v_proj", "o_proj", "down_proj")
    adapters = [
        bench.load(experts=sites, routers=sites, scope="linear", **rules),
        bench.load(plain=ATTENTION, rank=6, gains=True),
        bench.load(plain=("k_proj",), experts=FFN, routers=FFN, scope="linear", rank=2, **TOP_2),
    ]
    check_linears(bench, [[], *spread(adapters, lengths)], assert_close)


def test_a_mix_adds_up_what_each_adapter_changes(bench: Bench, assert_close: Any) -> None:
    lora = bench.load(plain=(*ATTENTION, *FFN), rank=7)
    dora, other = (bench.load(plain=(*ATTENTION, *FFN), rank=3, gains=True) for _ in range(2))
    routed = bench.load(experts=ATTENTION, routers=ATTENTION, scope="linear", **TOP_2)
    mix = [(lora, 0.7), (dora, 0.4), (other, -1.5)]
    rows = [
        mix,
        [],
        [(routed, 0.3), (dora, 2.0)],
        mix,
        mix,
        mix,
        [(lora, 0.5)],
        *spread([lora, dora, routed], (1, 2, 5)),
    ]
    check_linears(bench, rows, assert_close)


def expected_ffn(bench: Bench, base: Any, x: Any, adapters: Any) -> Any:
    """[hidden] of one row: gate, up, down and their biases are ``base``."""
    (gate, gate_bias), (up, up_bias), (down, down_bias) = base
    chosen = {}
    for adapter, _ in adapters:
        chosen = bench.weights(adapter, "mlp", x)
    if not chosen:
        g = expected_linear(bench, "gate_proj", x, gate @ x + gate_bias, gate_bias, adapters)
        u = expected_linear(bench, "up_proj", x, up @ x + up_bias, up_bias, adapters)
        h = F.silu(g) * u
        return expected_linear(bench, "down_proj", h, down @ h + down_bias, down_bias, adapters)
    adapter = adapters[0][0]
    activation = {None: F.silu, "gelu": F.gelu, "relu": F.relu}[bench.specs[adapter].routing.activation]
    y = torch.zeros_like(down_bias)
    for e, p in chosen.items():
        g, u = gate @ x + gate_bias, up @ x + up_bias
        g = g + bench.change(adapter, "gate_proj", e, x, g, gate_bias)
        u = u + bench.change(adapter, "up_proj", e, x, u, up_bias)
        h = activation(g) * u
        d = down @ h + down_bias
        y += p * (d + bench.change(adapter, "down_proj", e, h, d, down_bias))
    return y


def check_ffn(bench: Bench, rows: list[list[tuple[ResidentAdapter, float]]], assert_close: Any) -> None:
    pool = bench.pool
    groups = pool.widths.groups
    hidden, ffn = pool.widths.hidden, pool.widths.ffn
    gate_up, down = pool.normal(2 * ffn, hidden) / hidden**0.5, pool.normal(hidden, ffn) / ffn**0.5
    gate_up_bias, down_bias = pool.normal(2 * ffn), pool.normal(hidden)
    x = pool.normal(len(rows), hidden)
    parts = zip((*gate_up.double().chunk(2), down.double()), (*gate_up_bias.double().chunk(2), down_bias.double()))
    base = list(parts)
    expected = torch.stack([expected_ffn(bench, base, x[row].double(), rows[row]) for row in range(len(rows))])

    def project_down(h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, down, down_bias)

    step, chunks = StepAdapters(*arrange(rows)), pool.chunks(LAYER)
    wide = F.linear(x, gate_up, gate_up_bias)
    networks = step.run_experts(wide, x, chunks, LAYER, groups["gate_up"], gate_up_bias, "silu")
    step.add(wide, x, chunks, LAYER, groups["gate_up"], gate_up_bias)
    h = F.silu(wide[:, :ffn]) * wide[:, ffn:]
    if networks is not None:
        h = networks.combine(len(rows), h.clone)
    y = project_down(h)
    step.add(y, h, chunks, LAYER, groups["down"], down_bias)
    if networks is not None:
        networks.add_down(y, chunks, LAYER, groups["down"], project_down, down_bias)
    assert_close(y, expected)


@pytest.mark.parametrize("rules", [TOP_2, SWITCH, DYNAMIC, COOLED, DENSE], ids=str)
@pytest.mark.parametrize("sites", [FFN, ("gate_proj",), ("up_proj", "down_proj"), ("down_proj",)], ids=str)
@pytest.mark.parametrize("gains", [False, True], ids=["plain", "gains"])
def test_mixtures_of_feed_forward_networks_beside_others(
    bench: Bench, assert_close: Any, rules: Any, sites: Any, gains: bool
) -> None:
    mixtures = [
        bench.load(plain=ATTENTION, experts=sites, routers=("mlp",), scope="ffn", gains=gains, **rules),
        bench.load(experts=FFN, routers=("mlp",), scope="ffn", num_experts=8, rank=2, activation="gelu", **TOP_2),
        bench.load(experts=FFN, routers=("mlp",), scope="ffn", num_experts=1, rank=9, activation="relu", **SWITCH),
    ]
    others = [bench.load(plain=FFN, rank=3), bench.load(plain=FFN, rank=2, gains=True)]
    check_ffn(bench, [[], *spread([*mixtures, *others], (1, 2, 1, 1, 2))], assert_close)
    check_ffn(bench, [[], [], *spread([*mixtures, *others], (13, 9, 3, 4, 1))], assert_close)
    check_ffn(bench, spread(mixtures[:1], (300,)), assert_close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(1, 2, 1), (9, 1, 4)], ids=str)
def test_half_precision_routes_as_float32_does(
    make_pool: Any, make_widths: Any, assert_close: Any, dtype: torch.dtype, lengths: Any
) -> None:
    bench = Bench(make_pool(make_widths(100, 64, 136), dtype, num_layers=2))
    adapters = [
        bench.load(experts=FFN, routers=("mlp",), scope="ffn", gains=gains, **rules)
        for gains, rules in ((False, TOP_2), (True, DYNAMIC), (False, SWITCH))
    ]
    rows = spread(adapters, lengths)
    log = RouteLog()
    batch = arrange(rows)[3]
    x = bench.pool.normal(len(rows), 100)
    choice = batch.choose(LAYER, "mlp", x, bench.pool.chunks(LAYER))
    log.add(LAYER, "mlp", choice)
    for record in log.records:
        for row, experts, weights in zip(record.rows, record.experts, record.weights):
            expected = bench.weights(record.adapter, "mlp", x[row].double())
            found = {int(e): float(w) for e, w in zip(experts, weights) if w}
            assert found == pytest.approx(expected, abs=1e-6)


def test_ties_go_to_the_lowest_expert_and_absent_experts_are_never_chosen() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, float("-inf")], [5.0, *[float("-inf")] * 3]])
    full = torch.full((3,), float("inf"))
    experts, weights = ops.route(logits, torch.tensor([2, 1, 1]), torch.tensor([True] * 3), full, torch.ones(3))
    assert experts[0, :2].tolist() == [0, 1]
    assert weights[0].tolist() == [0.5, 0.5, 0, 0]
    assert experts[1, 0] == 1
    assert weights[2].tolist() == [1, 0, 0, 0]


def test_a_dynamic_prefix_that_never_exceeds_the_bound_takes_all() -> None:
    logits = torch.zeros(1, 4)
    arguments = (torch.tensor([4]), torch.tensor([False]), torch.tensor([0.8]), torch.tensor([2.0]))
    _, weights = ops.route(logits, *arguments)
    assert weights.tolist() == [[0.125] * 4]


def test_a_broken_row_still_takes_no_more_experts_than_it_may() -> None:
    logits = torch.tensor([[float("nan")] * 4, [1.0, 0.0, 0.0, 0.0]])
    full = torch.full((2,), float("inf"))
    _, weights = ops.route(logits, torch.tensor([2, 2]), torch.tensor([True, True]), full, torch.ones(2))
    assert weights[0].count_nonzero() <= 2
    assert weights[1].isfinite().all()


def test_rows_whose_adapter_has_no_router_in_a_layer_are_left_alone(bench: Bench) -> None:
    mixture = bench.load(experts=FFN, routers=("mlp",), scope="ffn", **TOP_2)
    step = StepAdapters(*arrange([[(mixture, 1.0)]] * 3))
    x = bench.pool.normal(3, 100)
    gate_up = bench.pool.normal(3, 272)
    group = bench.pool.widths.groups["gate_up"]
    assert step.run_experts(gate_up, x, bench.pool.chunks(0), 0, group, None, "silu") is None
