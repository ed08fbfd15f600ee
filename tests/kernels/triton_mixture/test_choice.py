"""Lists of routed rows, and what the device chooses for them, against the host's routing and written-out rules."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.device_mixture import _choose
from loraplex.kernels.lora_tiles import choose_block_rows
from loraplex.kernels.route_launch import most_tiles
from loraplex.kernels.routed_lists import DeviceRouted, RoutedLists, list_routed
from loraplex.kernels.router_plan import RoutedRows

LAYER = 1
RULES: dict[str, dict[str, Any]] = {
    "top_2": {"limit": 2, "renormalize": True},
    "switch": {"limit": 1, "renormalize": False},
    "dynamic": {"limit": 4, "renormalize": False, "top_p": 0.6},
    "cooled": {"limit": 3, "renormalize": True, "top_p": 0.4, "temperature": 1.7},
}


def load_all(bench: Any, **options: Any) -> list[Any]:
    """An adapter for each of the rules, with 4 or 5 experts."""
    return [
        bench.load(experts=("o_proj",), routers=("o_proj",), num_experts=4 + i % 2, scope="linear", **rules, **options)
        for i, rules in enumerate(RULES.values())
    ]


def choose(bench: Any, routed: DeviceRouted, x: torch.Tensor, layer: int = LAYER, site: str = "o_proj") -> Any:
    table = bench.table
    return _choose(x, bench.pool.chunks(layer), table, routed, layer, table.first_site((site,), layer), 1)[0]


def chosen_of(lists: RoutedLists, choice: Any) -> dict[tuple[int, int], dict[int, float]]:
    """By part and row, as a host maps it back."""
    found = {}
    for number, (part, places) in enumerate(zip(lists.parts, lists.places)):
        for row, place in zip(part.rows.tolist(), places.tolist()):
            pairs = zip(choice.experts[place].tolist(), choice.weights[place].tolist())
            found[number, row] = {expert: weight for expert, weight in pairs if weight}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_choice_is_that_of_the_host_whatever_the_rules(
    make_bench: Any, route_on_host: Any, send_lists: Any, dtype: torch.dtype
) -> None:
    bench = make_bench(dtype, hidden=1100)
    adapters = load_all(bench)
    rows = ([6], [1, 2], [7, 8, 3], [5, 2])
    parts = [RoutedRows(a, np.array(r), w) for a, r, w in zip(adapters, rows, (1.0, 1.0, 1.0, 0.5))]
    lists = list_routed(parts, bench.table)
    x = bench.pool.normal(9, 1100)
    found = chosen_of(lists, choose(bench, send_lists(lists), x).choice)
    host = route_on_host(parts).choose(LAYER, "o_proj", x, bench.chunks)
    at = {id(part): number for number, part in enumerate(parts)}
    place = 0
    for part in host.parts:
        for row in part.rows.tolist():
            pairs = zip(host.experts[place].tolist(), host.weights[place].tolist())
            assert found[at[id(part)], row] == pytest.approx({e: w for e, w in pairs if w}, rel=1e-4, abs=1e-7)
            place += 1
    for (number, row), weights in found.items():
        assert weights == pytest.approx(bench.weights(parts[number].adapter, "o_proj", x[row].double()), abs=1e-5)


@pytest.mark.parametrize(("limit", "top_p"), [(1, None), (3, None), (4, 0.55), (4, 0.8)])
def test_ties_go_to_the_lowest_experts(make_bench: Any, limit: int, top_p: float | None) -> None:
    bench = make_bench()
    rules = {"limit": limit, "renormalize": False, "top_p": top_p}
    adapter = bench.load(experts=("o_proj",), routers=("o_proj",), tied=True, scope="linear", **rules)
    choice = choose(bench, bench.routed([RoutedRows(adapter, np.array([0]))]), bench.pool.normal(1, 100)).choice
    taken = min(limit, 4 if top_p is None else int(top_p * 4) + 1)
    assert choice.experts[0, :taken].tolist() == list(range(taken))
    assert choice.weights[0].tolist() == [0.25] * taken + [0.0] * (choice.weights.shape[1] - taken)


def test_an_adapter_without_a_router_and_padding_choose_nothing(make_bench: Any) -> None:
    bench = make_bench()
    rules = RULES["top_2"]
    without = bench.load(experts=("q_proj",), routers=("q_proj",), scope="linear", **rules)
    routed = bench.load(experts=("o_proj",), routers=("o_proj",), scope="linear", **rules)
    parts = [RoutedRows(without, np.array([0, 2])), RoutedRows(routed, np.array([1]))]
    found = choose(bench, bench.routed(parts, spare=3), bench.pool.normal(3, 100))
    assert (found.slot_units.view(6, 2) >= 0).tolist() == [[False, False], [True, True], *[[False, False]] * 4]
    assert (found.choice.weights != 0).sum() == 2
    assert int(found.tiles[2].sum()) == 2
    other_layer = choose(bench, bench.routed(parts, spare=3), bench.pool.normal(3, 100), layer=0)
    assert not other_layer.choice.weights.any()
    assert not other_layer.tiles[2].any()
    assert int(other_layer.num_tiles) == 0


def test_more_slots_and_a_wider_block_of_experts_change_no_choice(make_bench: Any) -> None:
    bench = make_bench()
    parts = [RoutedRows(adapter, np.arange(i, 8, 4)) for i, adapter in enumerate(load_all(bench))]
    x = bench.pool.normal(8, 100)
    tight = choose(bench, bench.routed(parts), x).choice
    roomy = choose(bench, bench.routed(parts, spare=5, most=8, max_experts=32, block_rows=64), x).choice
    most = tight.experts.shape[1]
    assert torch.equal(tight.weights, roomy.weights[:8, :most])
    assert torch.equal(tight.experts[tight.weights > 0], roomy.experts[:8, :most][tight.weights > 0])
    assert not roomy.weights[:, most:].any()


@pytest.mark.parametrize(("num_rows", "block_rows", "cut_block"), [(45, 16, 16), (29, 64, 1024)])
def test_slots_are_sorted_by_unit_and_cut_into_tiles(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch, num_rows: int, block_rows: int, cut_block: int
) -> None:
    monkeypatch.setattr("loraplex.kernels.route_launch.CUT_BLOCK", cut_block)
    bench = make_bench()
    adapter = load_all(bench)[0]
    routed = bench.routed([RoutedRows(adapter, np.arange(num_rows))], block_rows=block_rows, spare=3)
    found = choose(bench, routed, bench.pool.normal(num_rows, 100))
    units = found.slot_units.cpu().numpy()
    order = np.argsort(np.where(units < 0, 1 << 30, units), kind="stable")
    assert np.array_equal(found.slots.cpu().numpy(), order)
    assert np.array_equal(found.rows.cpu().numpy()[: 2 * num_rows], order[: 2 * num_rows] // 2)
    assert np.array_equal(found.weights.cpu().numpy(), found.slot_weights.cpu().numpy()[order])
    tile_units, firsts, counts = (array.cpu().numpy() for array in found.tiles)
    num_tiles = int(found.num_tiles)
    assert len(counts) == most_tiles(routed.num_slots, block_rows, len(bench.table.first_page))
    assert counts[:num_tiles].all()
    assert not counts[num_tiles:].any()
    _, expected = np.unique(units[units >= 0], return_counts=True)
    assert num_tiles == (-(-expected // block_rows)).sum()
    assert counts.sum() == 2 * num_rows
    assert counts.max() <= block_rows
    for unit, first, count in zip(tile_units[:num_tiles], firsts, counts):
        assert (units[order[first : first + count]] == unit).all()


def test_there_are_no_more_places_for_tiles_than_may_be_filled() -> None:
    # 2048 rows of up to 8 experts; of each of 100 units, one tile may be filled in part.
    assert most_tiles(2048 * 8, 64, 100) == 512
    assert most_tiles(3, 16, 100) == 4
    assert most_tiles(1, 16, 1) == 1


def test_lists_hold_entries_in_the_order_of_rows_and_tiles_by_unit(make_bench: Any) -> None:
    bench = make_bench()
    first, second, third, _ = load_all(bench)
    parts = [
        RoutedRows(second, np.array([9, 4]), 0.5),
        RoutedRows(first, np.arange(3, 22)),
        RoutedRows(second, np.array([0])),
        RoutedRows(third, np.array([4]), 2.0),
    ]
    lists = list_routed(parts, bench.table)
    again = list_routed(parts[::-1], bench.table).arrays()
    assert all(np.array_equal(array, again[name]) for name, array in lists.arrays().items())
    parts = sorted(parts, key=lambda part: (bench.table.unit_of(part.adapter), part.weight))
    expected = sorted((row, number) for number, part in enumerate(parts) for row in part.rows.tolist())
    assert lists.rows.tolist() == [row for row, _ in expected]
    assert lists.weights.tolist() == [parts[number].weight for _, number in expected]
    assert lists.limits.tolist() == [parts[number].routing.limit for _, number in expected]
    assert lists.sum_rows.tolist() == sorted({row for row, _ in expected})
    assert np.array_equal(lists.rows[lists.sum_starts[:-1]], lists.sum_rows)
    assert (lists.sum_starts[-1], lists.most, lists.max_experts, lists.block_rows) == (23, 4, 16, choose_block_rows(19))
    for part, places in zip(parts, lists.places):
        assert np.array_equal(lists.rows[places], part.rows)
        assert (lists.units[places] == bench.table.unit_of(part.adapter)).all()
    assert sorted(lists.score_places.tolist()) == list(range(23))
    for unit, start, count in zip(lists.tile_units, lists.tile_firsts, lists.tile_counts):
        assert (lists.units[lists.score_places[start : start + count]] == unit).all()
    assert lists.tile_counts.tolist() == [16, 3, 3, 1]
    assert np.array_equal(lists.arrays(8)["slot_starts"], lists.sum_starts * 8)


def test_256_routed_rows_are_listed_quickly(make_bench: Any) -> None:
    bench = make_bench()
    parts = [RoutedRows(adapter, np.arange(i, 256, 4)) for i, adapter in enumerate(load_all(bench))]
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        list_routed(parts, bench.table).arrays()
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.002, f"{1e6 * min(taken):.0f} us"


def test_capacities_must_be_powers_of_two(make_bench: Any, send_lists: Any) -> None:
    bench = make_bench()
    lists = list_routed([RoutedRows(load_all(bench)[0], np.arange(2))], bench.table)
    for most, max_experts in ((3, 16), (2, 20), (2, 8)):
        with pytest.raises(ValueError, match="powers of two"):
            send_lists(lists, most=most, max_experts=max_experts)
