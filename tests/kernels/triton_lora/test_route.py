"""Routing, sorting and the work of chosen experts on the device, in the interpreter, against the host's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_launch import add_paged_lora
from loraplex.kernels.lora_plan import UnitSet
from loraplex.kernels.route_launch import MAX_SLOTS, RoutedStep
from loraplex.kernels.router_plan import RoutedBatch, RoutedRows

CPU = torch.device("cpu")
RULES = {
    "top_2": {"limit": 2, "renormalize": True},
    "switch": {"limit": 1, "renormalize": False},
    "dynamic": {"limit": 4, "renormalize": False, "top_p": 0.6},
    "cooled": {"limit": 4, "renormalize": False, "top_p": 0.6, "temperature": 1.7},
}


def load_mixtures(bench: Any, gains: bool = False) -> list[Any]:
    return [
        bench.load(
            experts=("o_proj",),
            routers=("o_proj",),
            ranks=(3, 8, 17),
            num_experts=4 + i % 2,
            gains=gains,
            scope="linear",
            **rules,
        )
        for i, rules in enumerate(RULES.values())
    ]


def on_host(parts: list[RoutedRows]) -> RoutedBatch:
    """The same rows for the host's routing, which is proved against dense products."""
    units = [(part.adapter, expert) for part in parts for expert in range(part.routing.num_experts)]
    return RoutedBatch(tuple(parts), UnitSet(tuple(units), CPU))


def run(pool: Any, table: Any, parts: list[RoutedRows], y: torch.Tensor, x: torch.Tensor) -> Any:
    group = pool.widths.groups["o"]
    step = RoutedStep(parts, table, CPU)
    chosen = step.choose(0, "o_proj", x, pool.chunks(0), group, max_rank=17)
    add_paged_lora(y, x, pool.chunks(0), table, chosen.tiles, 0, group, work=chosen.work)
    return step, chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_choice_is_that_of_the_host_and_its_experts_match_dense_products(
    make_pool: Any, make_table: Any, make_mixtures: Any, assert_close: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    bench = make_mixtures(pool)
    adapters = load_mixtures(bench, gains=True)
    table = make_table(pool, adapters)
    rows = ([6], [1, 2], [7, 8, 3], [5])
    parts = [RoutedRows(a, np.array(r), w) for a, r, w in zip(adapters, rows, (1.0, 1.0, 1.0, 0.5))]
    y, x = pool.normal(9, 100), pool.normal(9, 100)
    host = on_host(parts).choose(0, "o_proj", x, pool.chunks(0))
    assert host is not None
    by_row = {int(row): part for part in parts for row in part.rows}
    dense = y.double()
    for row, experts, weights in zip(host.rows.tolist(), host.experts, host.weights):
        part, base = by_row[row], y[row].double()
        for expert, weight in zip(experts.tolist(), weights.tolist()):
            if weight:
                change = bench.change(part.adapter, "o_proj", expert, x[row].double(), base)
                dense[row] += part.weight * weight * change
    untouched = y[[0, 4]].clone()
    step, chosen = run(pool, table, parts, y, x)
    assert_close(y, dense)
    assert torch.equal(y[[0, 4]], untouched)
    place = {int(row): i for i, row in enumerate(step.tiles.rows.y_rows)}
    for i, row in enumerate(host.rows.tolist()):
        weights = chosen.weights[place[row]].numpy()
        assert np.allclose(weights, host.weights[i, : len(weights)], rtol=1e-4, atol=1e-7)
        taken = weights > 0
        mine = chosen.experts[place[row]].numpy()
        assert np.array_equal(mine[taken], host.experts[i, : len(mine)][taken])


def test_slots_are_sorted_by_unit_and_cut_into_tiles(make_pool: Any, make_table: Any, make_mixtures: Any) -> None:
    pool = make_pool(num_layers=1)
    adapters = load_mixtures(make_mixtures(pool))[:1]
    table = make_table(pool, adapters)
    rows = 45
    y, x = pool.normal(rows, 100), pool.normal(rows, 100)
    _, chosen = run(pool, table, [RoutedRows(adapters[0], np.arange(rows))], y, x)
    tiles, units = chosen.tiles, chosen.tiles.sums.slot_units
    assert len(units) == 2 * rows
    order = np.argsort(units.numpy(), kind="stable")
    assert np.array_equal(tiles.rows.slots.numpy(), order)
    assert np.array_equal(tiles.rows.y_rows.numpy(), order // 2)
    counts, starts = tiles.tile_counts.numpy(), chosen.work.shrink_starts.numpy()
    assert counts.sum() == 2 * rows
    assert counts.max() <= tiles.block_rows
    for first in np.flatnonzero(counts):
        assert len(set(units.numpy()[order[first : first + counts[first]]])) == 1
    assert starts[-1] == sum(-(-(3, 8, 17)[(int(tiles.tile_units[i]) - 1) % 3] // 16) for i in np.flatnonzero(counts))
    assert math.isclose(float(chosen.weights.sum()), rows, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_routed_row_has_the_same_bits_alone_and_among_any_neighbours(
    make_pool: Any, make_table: Any, make_mixtures: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    adapters = load_mixtures(make_mixtures(pool))
    table = make_table(pool, adapters)
    y, x = pool.normal(8, 100), pool.normal(8, 100)
    together, alone = y.clone(), y.clone()
    parts = [RoutedRows(adapters[0], np.array([2, 5, 7])), RoutedRows(adapters[3], np.array([0, 1, 6]))]
    run(pool, table, parts, together, x)
    run(pool, table, [RoutedRows(adapters[0], np.array([5]))], alone, x)
    assert torch.equal(together[5], alone[5])
    assert not torch.equal(y[5], alone[5])


def test_more_slots_than_one_program_counts_are_refused(make_pool: Any, make_table: Any, make_mixtures: Any) -> None:
    pool = make_pool(num_layers=1)
    adapters = load_mixtures(make_mixtures(pool))[:1]
    table = make_table(pool, adapters)
    with pytest.raises(ValueError, match=f"2049 rows of up to 2 experts are more than {MAX_SLOTS}"):
        RoutedStep([RoutedRows(adapters[0], np.arange(2049))], table, CPU)


def test_every_operator_passes_opcheck(
    make_pool: Any, make_table: Any, make_mixtures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(num_layers=1)
    adapters = load_mixtures(make_mixtures(pool))[:1]
    table, real = make_table(pool, adapters), torch.ops.loraplex
    calls: dict[str, tuple[Any, ...]] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                calls[name] = arguments
                return getattr(real, name)(*arguments)

            return call

    monkeypatch.setattr("loraplex.kernels.route_launch.torch.ops.loraplex", Recorder())
    run(pool, table, [RoutedRows(adapters[0], np.arange(1))], pool.normal(1, 100), pool.normal(1, 100))
    monkeypatch.undo()
    assert {"route_on_device", "sort_on_device"} < set(calls)
    for name in ("route_on_device", "sort_on_device"):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(real, name).default, calls[name], test_utils=checks)
