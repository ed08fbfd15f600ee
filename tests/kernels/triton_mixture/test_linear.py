"""Experts of linears with routers of their own, on the device: against dense products, and the host's path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels import mixture
from loraplex.kernels.device_mixture import add_routed
from loraplex.kernels.routed_lists import routed_sites
from loraplex.kernels.router_plan import RoutedRows

LAYER = 1
TOP_2 = {"limit": 2, "renormalize": True}
SWITCH = {"limit": 1, "renormalize": False}
DYNAMIC = {"limit": 3, "renormalize": False, "top_p": 0.6, "temperature": 1.3}
QKV = ("q_proj", "k_proj", "v_proj")


def load_some(bench: Any, gains: bool = False) -> list[Any]:
    options: dict[str, Any] = {"scope": "linear", "gains": gains}
    return [
        bench.load(experts=QKV, routers=QKV, ranks=(3, 8, 17), **TOP_2, **options),
        bench.load(experts=("k_proj",), routers=("k_proj",), num_experts=5, **SWITCH, **options),
        bench.load(experts=("q_proj", "v_proj"), routers=("q_proj", "v_proj"), num_experts=6, **DYNAMIC, **options),
    ]


def expected(bench: Any, group: Any, parts: list[RoutedRows], y: torch.Tensor, x: torch.Tensor, bias: Any) -> Any:
    result = y.double()
    for part in parts:
        for row in part.rows.tolist():
            at = 0
            for site, width in zip(group.sites, group.out_features):
                here = slice(at, at + width)
                for expert, weight in bench.weights(part.adapter, site, x[row].double()).items():
                    base = y[row, here].double()
                    change = bench.change(part.adapter, site, expert, x[row].double(), base, bias[here].double())
                    result[row, here] += part.weight * weight * change
                at += width
    return result


@pytest.mark.parametrize(("dtype", "gains"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_every_adapter_of_a_batch_adds_what_its_routers_chose(
    make_bench: Any, assert_close: Any, dtype: torch.dtype, gains: bool
) -> None:
    bench = make_bench(dtype)
    first, second, third = load_some(bench, gains)
    rows = np.array([1, 2]), np.array([4, 0]), np.array([5]), np.array([4])
    parts = [RoutedRows(a, r, w) for a, r, w in zip((first, second, third, first), rows, (1.0, 1.0, 1.0, -0.5))]
    group = bench.pool.widths.groups["qkv"]
    y, x, bias = bench.pool.normal(7, 228), bench.pool.normal(7, 100), bench.pool.normal(228)
    dense, untouched = expected(bench, group, parts, y, x, bias), y[[3, 6]].clone()
    y[6], x[6] = float("nan"), float("nan")
    choices = add_routed(y, x, bench.chunks, bench.table, bench.routed(parts, spare=2), LAYER, group, bias)
    assert [site for site, _ in choices] == list(QKV)
    assert torch.equal(y[3], untouched[0])
    assert y[6].isnan().all()
    assert_close(y[:6], dense[:6])


def test_it_is_what_the_host_adds(make_bench: Any, route_on_host: Any, assert_close: Any) -> None:
    bench = make_bench()
    parts = [RoutedRows(adapter, np.arange(i, 6, 3)) for i, adapter in enumerate(load_some(bench))]
    group = bench.pool.widths.groups["qkv"]
    y, x = bench.pool.normal(6, 228), bench.pool.normal(6, 100)
    host = y.clone()
    choices = mixture.add_routed(host, x, bench.chunks, LAYER, group, route_on_host(parts))
    found = add_routed(y, x, bench.chunks, bench.table, bench.routed(parts), LAYER, group)
    assert [site for site, _ in choices] == [site for site, _ in found]
    assert_close(y, host.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_any_neighbours(make_bench: Any, dtype: torch.dtype) -> None:
    bench = make_bench(dtype, hidden=200)
    options: dict[str, Any] = {"experts": ("o_proj",), "routers": ("o_proj",), "scope": "linear", "ranks": (3, 17)}
    first, second, third = (bench.load(**rules, **options) for rules in (TOP_2, SWITCH, DYNAMIC))
    group = bench.pool.widths.groups["o"]
    y, x = bench.pool.normal(8, 200), bench.pool.normal(8, 200)
    together, alone = y.clone(), y.clone()
    beside = [RoutedRows(third, np.array([0, 5])), RoutedRows(second, np.array([6]))]
    mine = [RoutedRows(first, np.array([5]), 0.5), RoutedRows(third, np.array([5]))]
    crowd = [*beside, RoutedRows(first, np.array([2, 5]), 0.5)]
    for parts, to, options in ((crowd, together, {"most": 8, "block_rows": 64, "spare": 1}), (mine, alone, {})):
        add_routed(to, x, bench.chunks, bench.table, bench.routed(parts, **options), LAYER, group)
    assert torch.equal(together[5], alone[5])
    assert not torch.equal(y[5], alone[5])


def test_sites_that_no_adapter_routes_are_not_launched(make_bench: Any) -> None:
    bench = make_bench()
    _, second, _ = load_some(bench)
    parts, groups = [RoutedRows(second, np.array([0, 1]))], bench.pool.widths.groups
    routed = bench.routed(parts, sites=frozenset({"k_proj"}))
    y, x = bench.pool.normal(2, 228), bench.pool.normal(2, 100)
    before = y.clone()
    found = add_routed(y, x, bench.chunks, bench.table, routed, LAYER, groups["qkv"])
    assert [site for site, _ in found] == ["k_proj"]
    assert torch.equal(y[:, :100], before[:, :100])
    assert not torch.equal(y[:, 100:164], before[:, 100:164])
    assert add_routed(y, x, bench.chunks, bench.table, routed, LAYER, groups["o"]) == []
    assert routed_sites([second]) == {"k_proj"}


def test_a_layer_without_routers_changes_nothing(make_bench: Any) -> None:
    bench = make_bench()
    parts = [RoutedRows(load_some(bench)[0], np.array([0, 1]))]
    y, x = bench.pool.normal(2, 228), bench.pool.normal(2, 100)
    before = y.clone()
    add_routed(y, x, bench.pool.chunks(0), bench.table, bench.routed(parts), 0, bench.pool.widths.groups["qkv"])
    assert torch.equal(y, before)
