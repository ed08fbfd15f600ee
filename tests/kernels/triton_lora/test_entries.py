"""Gains, weights and rows with several entries against dense products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_launch import StepWork, add_entries
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists, list_entries

ATTENTION = ("q_proj", "k_proj", "v_proj")
Entry = tuple[int, Any, int | None, float]
"""Row, adapter, expert, weight."""


def lists_of(table: Any, entries: list[Entry], x_rows: Any = None) -> EntryLists:
    units = np.array([table.unit_of(adapter, expert) for _, adapter, expert, _ in entries])
    rows = np.array([row for row, *_ in entries])
    weights = np.array([weight for *_, weight in entries], dtype=np.float32)
    return list_entries(units, rows, x_rows=x_rows, weights=weights)


def add(pool: Any, table: Any, lists: EntryLists, y: Any, x: Any, group: Any, **rest: Any) -> None:
    """One group of layer 0, with tensors a little larger than the lists."""
    entries = DeviceEntries.copy_of(lists, pool.device, entries=len(lists.order) + 3, rows=len(lists.order) + 1)
    work = StepWork.of(entries, table, pool.dtype)
    add_entries(y, x, pool.chunks(0), table, entries, work, 0, group, **rest)


def expected(bench: Any, group: Any, entries: list[Entry], y: Any, x: Any, bias: Any) -> torch.Tensor:
    out, pure = y.double().clone(), y.double() - bias.double()
    for row, adapter, expert, weight in entries:
        at = 0
        for site, width in zip(group.sites, group.out_features):
            here = slice(at, at + width)
            out[row, here] += weight * bench.change(adapter, site, expert, x[row].double(), pure[row, here])
            at += width
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gains_weights_and_many_entries_of_a_row_match_dense_products(
    make_pool: Any, make_table: Any, make_mixtures: Any, assert_close: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    bench, group = make_mixtures(pool), pool.widths.groups["qkv"]
    dora = bench.load(plain=("q_proj", "v_proj"), ranks=(5,), gains=True)
    plain = bench.load(plain=("k_proj",), ranks=(17,))
    experts = bench.load(experts=ATTENTION, ranks=(3, 20), num_experts=3)
    entries: list[Entry] = [
        (4, plain, None, 0.5),
        (1, dora, None, 1.0),
        (4, dora, None, 0.25),
        (2, experts, 2, 0.7),
        (2, experts, 0, 0.3),
        (4, experts, 2, -1.0),
        (5, plain, None, 1.0),
    ]
    table = make_table(pool, [dora, plain, experts])
    y, x = pool.normal(6, sum(group.out_features)), pool.normal(6, 100)
    bias = pool.normal(y.shape[1])
    reference = expected(bench, group, entries, y, x, bias)
    untouched = y[[0, 3]].clone()
    add(pool, table, lists_of(table, entries), y, x, group, bias=bias)
    assert_close(y, reference)
    assert torch.equal(y[[0, 3]], untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_of_rows_with_one_entry_multiply_the_product_before_it_changes(
    make_pool: Any, make_table: Any, make_mixtures: Any, assert_close: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    bench, group = make_mixtures(pool), pool.widths.groups["qkv"]
    dora = bench.load(plain=ATTENTION, ranks=(5,), gains=True)
    table = make_table(pool, [dora])
    entries: list[Entry] = [(row, dora, None, 0.5) for row in (2, 0, 1)]
    y, x = pool.normal(3, sum(group.out_features)), pool.normal(3, 100)
    reference = expected(bench, group, entries, y, x, torch.zeros_like(y[0]))
    add(pool, table, lists_of(table, entries), y, x, group)
    assert_close(y, reference)


def test_gains_may_multiply_a_base_product_of_each_entry(
    make_pool: Any, make_table: Any, make_mixtures: Any, assert_close: Any
) -> None:
    pool = make_pool(num_layers=1)
    bench, group = make_mixtures(pool), pool.widths.groups["down"]
    adapter = bench.load(experts=("down_proj",), ranks=(4,), num_experts=3, gains=True)
    table = make_table(pool, [adapter])
    entries: list[Entry] = [(0, adapter, 2, 0.4), (0, adapter, 0, 0.6), (1, adapter, 1, 1.0)]
    x_rows = np.array([2, 0, 1])
    lists = lists_of(table, entries, x_rows)
    y, hidden, base = pool.normal(2, 100), pool.normal(3, 128), pool.normal(3, 100)
    reference = y.double().clone()
    for slot, ((row, _, expert, weight), x_row) in enumerate(zip(entries, x_rows)):
        x = hidden[x_row].double()
        reference[row] += weight * bench.change(adapter, "down_proj", expert, x, base[slot].double())
    add(pool, table, lists, y, hidden, group, gain_base=base)
    assert_close(y, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_several_entries_has_the_same_bits_alone_and_beside_rows_of_the_same_units(
    make_pool: Any, make_table: Any, make_mixtures: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    bench, group = make_mixtures(pool), pool.widths.groups["o"]
    adapter = bench.load(experts=("o_proj",), ranks=(3, 20), num_experts=3, gains=True)
    table = make_table(pool, [adapter])
    mine: list[Entry] = [(4, adapter, 2, 0.7), (4, adapter, 0, 0.3), (4, adapter, 1, 0.1)]
    others: list[Entry] = [(row, adapter, row % 3, 0.5) for row in (0, 1, 2, 3, 5, 6)]
    y, x = pool.normal(7, 100), pool.normal(7, 100)
    together, alone = y.clone(), y.clone()
    add(pool, table, lists_of(table, others[:4] + mine + others[4:]), together, x, group)
    add(pool, table, lists_of(table, mine), alone, x, group)
    assert torch.equal(together[4], alone[4])
    one = y.clone()
    add(pool, table, lists_of(table, others[1:2]), one, x, group)
    assert torch.equal(together[1], one[1])
    assert not torch.equal(one[1], y[1])
