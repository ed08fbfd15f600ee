"""Mixtures of feed-forward networks on the device against dense products in float64 and the host's path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loraplex.kernels import mixture
from loraplex.kernels.device_mixture import run_experts
from loraplex.kernels.routed_lists import have_gains
from loraplex.kernels.router_plan import RoutedRows

LAYER = 1
FFN = ("gate_proj", "up_proj", "down_proj")
TOP_2 = {"limit": 2, "renormalize": True}
SWITCH = {"limit": 1, "renormalize": False}
DYNAMIC = {"limit": 3, "renormalize": False, "top_p": 0.6, "temperature": 1.3}

ALLOWED = {torch.float16: 1.1, torch.bfloat16: 4.0}
"""Error of the device, of that of the host. The interpreter cuts off where a GPU rounds to bfloat16."""


class Base:
    """The base's feed-forward network.

    Args:
        biased: whether its linears have biases.
    """

    def __init__(self, bench: Any, activation: str = "silu", *, biased: bool = True) -> None:
        pool = bench.pool
        hidden, ffn = pool.widths.hidden, pool.widths.ffn
        self.gate_up = pool.normal(2 * ffn, hidden) / hidden**0.5
        self.down = pool.normal(hidden, ffn) / ffn**0.5
        self.gate_up_bias = pool.normal(2 * ffn) if biased else None
        self.down_bias = pool.normal(hidden) if biased else None
        self.activation = activation
        self.groups = pool.widths.groups
        self.bench = bench

    def project_down(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.down, self.down_bias)

    def run(self, x: torch.Tensor, start: Any) -> torch.Tensor:
        """The whole network; ``start(gate_up, group)`` begins its experts."""
        gate_up = F.linear(x, self.gate_up, self.gate_up_bias)
        experts = start(gate_up, self.groups["gate_up"])
        gate, up = gate_up.chunk(2, dim=-1)
        h = experts.combine(len(x), lambda: mixture.ACTIVATIONS[self.activation](gate) * up)
        y = self.project_down(h)
        experts.add_down(y, self.bench.chunks, LAYER, self.groups["down"], self.project_down, self.down_bias)
        return y

    def on_device(self, x: torch.Tensor, parts: list[RoutedRows], **options: Any) -> torch.Tensor:
        bench, routed = self.bench, self.bench.routed(parts, **options)

        def start(gate_up: torch.Tensor, group: Any) -> Any:
            bias = self.gate_up_bias
            return run_experts(gate_up, x, bench.chunks, bench.table, routed, LAYER, group, bias, self.activation)

        return self.run(x, start)

    def on_host(self, x: torch.Tensor, batch: Any) -> torch.Tensor:
        def start(gate_up: torch.Tensor, group: Any) -> Any:
            activation = mixture.ACTIVATIONS[self.activation]
            return mixture.run_experts(
                gate_up, x, self.bench.chunks, LAYER, group, batch, self.gate_up_bias, activation
            )

        return self.run(x, start)

    def expected(self, x: torch.Tensor, parts: list[RoutedRows]) -> torch.Tensor:
        """In float64, expert by expert."""
        ffn = self.down.shape[1]
        gate_bias, up_bias, down_bias = self._biases()
        owners = {int(row): part.adapter for part in parts for row in part.rows}
        result = []
        for row, one in enumerate(x.double()):
            gate = self.gate_up[:ffn].double() @ one + gate_bias
            up = self.gate_up[ffn:].double() @ one + up_bias
            adapter = owners.get(row)
            chosen: dict[Any, float] = {} if adapter is None else self.bench.weights(adapter, "mlp", one)
            y = torch.zeros_like(down_bias)
            for expert, weight in (chosen or {None: 1.0}).items():
                g, u, name = gate, up, self.activation
                if chosen:
                    name = self.bench.specs[adapter].routing.activation or name
                    g = g + self.bench.change(adapter, "gate_proj", expert, one, gate, gate_bias)
                    u = u + self.bench.change(adapter, "up_proj", expert, one, up, up_bias)
                h = mixture.ACTIVATIONS[name](g) * u
                d = self.down.double() @ h + down_bias
                y += weight * (
                    d + (self.bench.change(adapter, "down_proj", expert, h, d, down_bias) if chosen else 0.0)
                )
            result.append(y)
        return torch.stack(result)

    def _biases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.gate_up_bias is None or self.down_bias is None:
            ffn = torch.zeros_like(self.down[0], dtype=torch.float64)
            return ffn, ffn, torch.zeros_like(self.down[:, 0], dtype=torch.float64)
        gate, up = self.gate_up_bias.double().chunk(2)
        return gate, up, self.down_bias.double()


@pytest.mark.parametrize("gains", [False, True], ids=["plain", "gains"])
def test_experts_of_any_sites_rules_and_activations_run_in_one_batch(
    make_bench: Any, assert_close: Any, gains: bool
) -> None:
    bench = make_bench()
    options: dict[str, Any] = {"routers": ("mlp",), "scope": "ffn", "gains": gains}
    adapters = [
        bench.load(experts=FFN, ranks=(3, 20), **TOP_2, **options),
        bench.load(experts=("gate_proj",), num_experts=8, ranks=(2,), activation="gelu", **DYNAMIC, **options),
        bench.load(experts=("down_proj",), num_experts=1, ranks=(9,), activation="relu", **SWITCH, **options),
        bench.load(experts=FFN[1:], num_experts=3, ranks=(1,), activation="gelu_pytorch_tanh", **TOP_2, **options),
    ]
    rows = np.array([3]), np.array([1]), np.array([4]), np.array([2])
    parts = [RoutedRows(adapter, some) for adapter, some in zip(adapters, rows)]
    x, base = bench.pool.normal(5, 100), Base(bench)
    assert_close(base.on_device(x, parts, spare=1), base.expected(x, parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_dense_products_than_the_host(
    make_bench: Any, route_on_host: Any, rms: Any, dtype: torch.dtype
) -> None:
    bench = make_bench(dtype)
    options: dict[str, Any] = {"experts": FFN, "routers": ("mlp",), "scope": "ffn", "ranks": (4, 17)}
    adapters = [bench.load(**rules, gains=rules is DYNAMIC, **options) for rules in (TOP_2, DYNAMIC)]
    parts = [RoutedRows(adapters[0], np.array([2, 1])), RoutedRows(adapters[1], np.array([0]))]
    x, base = bench.pool.normal(3, 100), Base(bench, "gelu_new", biased=False)
    expected = base.expected(x, parts)
    on_host = rms(base.on_host(x, route_on_host(parts)), expected)
    assert rms(base.on_device(x, parts), expected) < ALLOWED[dtype] * on_host < 0.02


def test_it_is_what_the_host_runs(make_bench: Any, route_on_host: Any, assert_close: Any) -> None:
    bench = make_bench(ffn=136)
    options: dict[str, Any] = {"experts": FFN, "routers": ("mlp",), "scope": "ffn", "ranks": (4, 20)}
    parts = [
        RoutedRows(bench.load(**TOP_2, **options), np.arange(2)),
        RoutedRows(bench.load(gains=True, **DYNAMIC, **options), np.array([3, 2]), 0.5),
    ]
    x, base = bench.pool.normal(4, 100), Base(bench, "relu")
    assert_close(base.on_device(x, parts), base.on_host(x, route_on_host(parts)).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_any_neighbours(make_bench: Any, dtype: torch.dtype) -> None:
    bench = make_bench(dtype)
    options: dict[str, Any] = {"experts": FFN, "routers": ("mlp",), "scope": "ffn", "ranks": (4, 17)}
    mine, other = bench.load(**TOP_2, **options), bench.load(num_experts=6, **DYNAMIC, **options)
    x, base = bench.pool.normal(6, 100), Base(bench)
    gate_up = F.linear(x, base.gate_up, base.gate_up_bias)
    h, y = bench.pool.normal(6, bench.pool.widths.ffn), bench.pool.normal(6, 100)

    def run(parts: list[RoutedRows], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        routed, group = bench.routed(parts, **options), base.groups["gate_up"]
        arguments = (bench.chunks, bench.table, routed, LAYER, group, base.gate_up_bias, "silu")
        experts = run_experts(gate_up, x, *arguments)
        added = y.clone()
        experts.add_down(added, bench.chunks, LAYER, base.groups["down"], base.project_down, base.down_bias)
        return experts.combine(6, h.clone), added

    alone = run([RoutedRows(mine, np.array([3]))])
    crowd = [RoutedRows(other, np.array([5])), RoutedRows(mine, np.array([0, 3]))]
    together = run(crowd, block_rows=64, spare=1)
    for one, all_of_them, before in zip(alone, together, (h, y)):
        assert torch.equal(one[3], all_of_them[3])
        assert not torch.equal(one[3], before[3])
        assert torch.equal(all_of_them[1], before[1])


def test_experts_without_gains_need_no_product_of_their_own_with_the_base(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    options: dict[str, Any] = {"experts": FFN, "routers": ("mlp",), "scope": "ffn", **TOP_2}
    plain, other = bench.load(**options), bench.load(gains=True, **options)
    assert bench.table.has_gains
    assert (have_gains([plain]), have_gains([plain, other])) == (False, True)
    x, base = bench.pool.normal(2, 100), Base(bench)
    parts = [RoutedRows(plain, np.arange(2))]
    with_product = base.on_device(x, parts)
    projected: list[int] = []
    project = base.project_down

    def project_down(h: torch.Tensor) -> torch.Tensor:
        projected.append(len(h))
        return project(h)

    monkeypatch.setattr(base, "project_down", project_down)
    assert torch.equal(base.on_device(x, parts, gains=False), with_product)
    assert projected == [2]


def test_rows_of_an_adapter_without_a_router_in_the_layer_are_left_to_the_others(make_bench: Any) -> None:
    bench = make_bench()
    adapter = bench.load(experts=FFN, routers=("mlp",), scope="ffn", **TOP_2)
    routed, groups = bench.routed([RoutedRows(adapter, np.arange(2))], spare=1), bench.pool.widths.groups
    x, gate_up, h, y = (bench.pool.normal(3, width) for width in (100, 144, 72, 100))
    bias = bench.pool.normal(100)
    chunks = bench.pool.chunks(0)
    experts = run_experts(gate_up, x, chunks, bench.table, routed, 0, groups["gate_up"], None, "silu")
    assert torch.equal(experts.combine(3, h.clone), h)
    after = y.clone()
    experts.add_down(after, chunks, 0, groups["down"], lambda hidden: hidden.new_zeros(len(hidden), 100), bias)
    assert torch.equal(after, y)
