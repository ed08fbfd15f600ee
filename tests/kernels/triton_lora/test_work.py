"""How entries are listed, and how much work the kernels do: counted on the host, and alike on the device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_grid import count_blocks
from loraplex.kernels.lora_launch import StepWork
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists, list_entries, pad_entries, split_count

CPU = torch.device("cpu")
POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed")
Int64Array = np.ndarray[Any, np.dtype[np.int64]]


def draw(kind: str, rows: int, adapters: int) -> Int64Array:
    """The adapter of each row."""
    random = np.random.default_rng(11)
    return {
        "distinct": np.arange(rows) % adapters,
        "uniform": random.integers(0, adapters, rows),
        "zipf": np.minimum(random.zipf(1.5, rows), adapters) - 1,
        "identical": np.zeros(rows, dtype=np.int64),
        "skewed": np.where(np.arange(rows) < rows - 2, 0, np.arange(rows) % adapters),
    }[kind]


@pytest.fixture(scope="module")
def ranked() -> list[int]:
    return [1, 3, 8, 16, 64, 128, 256, 8, 16, 16] * 4


@pytest.mark.parametrize("kind", POPULARITY)
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_decode_reads_each_adapter_once_and_launches_no_idle_block(
    make_pool: Any, make_table: Any, ranked: list[int], kind: str, rows: int
) -> None:
    pool = make_pool(num_layers=1, num_pages=3000)
    adapters = [pool.load({"q_proj": rank, "v_proj": rank}) for rank in ranked]
    table, group = make_table(pool, adapters), pool.widths.groups["qkv"]
    drawn = draw(kind, rows, len(adapters))
    lists = list_entries(np.array([table.unit_of(adapters[i]) for i in drawn]), np.arange(rows))
    counts = count_blocks(lists, table, 0, group)
    ranks = np.array([2 * ranked[i] for i in set(drawn.tolist())])
    # Least possible: each distinct adapter's rank rows in blocks of 16, and its two sites' blocks of columns.
    assert counts.shrink == (-(-ranks // 16)).sum() * split_count(group.in_features)
    assert counts.expand == 2 * len(ranks)
    assert (counts.shrink_programs, counts.expand_programs) == (counts.shrink, counts.expand)
    assert counts.bytes_once == ranks.sum() * (1 + 1) * 256
    assert counts.bytes_loaded == counts.bytes_once
    captured = count_blocks(lists, table, 0, group, capacity=(256, 256), most_programs=1000)
    assert captured.shrink_programs == captured.expand_programs + 232 == 1000
    assert captured.shrink == counts.shrink


@pytest.mark.parametrize("base_rows", [0, 7, 300])
def test_blocks_are_those_of_the_work_present(make_pool: Any, make_table: Any, base_rows: int) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load({"q_proj": 8}), pool.load({"k_proj": 40, "v_proj": 1}), pool.load({"o_proj": 256})]
    table = make_table(pool, adapters)
    units = np.array([table.unit_of(adapter) for adapter in adapters])
    counts = count_blocks(list_entries(units, base_rows + np.arange(3)), table, 0, pool.widths.groups["qkv"])
    assert (counts.shrink, counts.expand) == (1 + 3, 1 + 2)


@pytest.mark.parametrize("tiles", [None, 256, 1024])
def test_the_device_counts_as_the_host_does(make_pool: Any, make_table: Any, tiles: int | None) -> None:
    pool = make_pool(num_layers=2)
    ranks = [{"q_proj": 8, "lm_head": 3}, {"k_proj": 40, "v_proj": 1}, {"embed_tokens": 33, "down_proj": 2}]
    adapters = [pool.load(of_site, layers=[i % 2]) for i, of_site in enumerate(ranks)]
    table, widths = make_table(pool, adapters), pool.widths
    units = np.array([table.unit_of(adapters[i]) for i in (2, 0, 1, 1, 0, 2, 1)])
    lists = list_entries(units, np.arange(7), block_rows=16)
    entries = DeviceEntries.copy_of(lists, pool.device, tiles=tiles)
    every = StepWork.of(entries, table, torch.bfloat16)
    places = [(layer, group) for layer in (0, 1) for group in widths.groups.values()]
    for layer, group in [*places, (None, widths.lm_head), (None, widths.embedding)]:
        counts = count_blocks(lists, table, layer, group)
        one = StepWork.at(entries, table, torch.bfloat16, layer, group)
        index, launch = every.places[group.sites]
        column = 2 if layer is None else layer
        for starts in (every.starts[column, index], one.starts[0, 0]):
            last = len(entries.tile_units)
            assert starts[:, last].tolist() == [counts.shrink // launch.parts, counts.expand]
            assert (starts[:, 1 : last + 1] >= starts[:, :last]).all()
            assert not starts[:, 0].any()


def test_a_group_that_no_adapter_has_is_not_launched(make_pool: Any, make_step: Any, make_segments: Any) -> None:
    pool = make_pool(num_layers=1)
    step, group = make_step(pool, make_segments(0, [(pool.load({"q_proj": 4}), 2)])), pool.widths.groups["o"]
    assert step.work.places[group.sites][1].idle
    assert count_blocks(step.lists, step.table, 0, group, capacity=(16, 16)).shrink_programs == 0
    y, x = pool.normal(2, 100), pool.normal(2, 100) * float("nan")
    assert torch.equal(step.add(y.clone(), x, 0, group), y)


def test_one_site_of_a_group_may_be_counted_alone(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=1)
    adapter = pool.load({"q_proj": 8, "k_proj": 40})
    table = make_table(pool, [adapter])
    lists = list_entries(np.array([table.unit_of(adapter)]), np.array([4]))
    entries = DeviceEntries.copy_of(lists, pool.device)
    work = StepWork.at(entries, table, torch.bfloat16, 0, SiteGroup(("k_proj",), 100, (64,)))
    assert work.places[("k_proj",)][1].rank == 64
    assert work.starts[0, 0, :, 1].tolist() == [3, 1]


@pytest.mark.parametrize("rows", [17, 64, 257, 1000])
def test_a_prefill_chunk_is_cut_into_whole_tiles(rows: int) -> None:
    lists = list_entries(np.full(rows, 3), np.arange(rows))
    tiles = len(lists.tile_counts)
    assert lists.tile_counts.sum() == rows
    assert tiles == -(-rows // lists.block_rows)
    assert np.array_equal(lists.tile_firsts, np.arange(tiles) * lists.block_rows)
    assert lists.sum_rows is None


def test_entries_are_sorted_by_unit_and_summed_by_row() -> None:
    units, rows = np.array([7, 2, 7, 2, 5]), np.array([3, 3, 1, 0, 3])
    weights = np.array([1, 2, 3, 4, 5], dtype=np.float32)
    lists = list_entries(units, rows, x_rows=np.arange(5), weights=weights)
    assert lists.order.tolist() == [1, 3, 4, 0, 2]
    assert lists.weights.tolist() == [2, 4, 5, 1, 3]
    assert lists.x_rows.tolist() == lists.order.tolist()
    assert lists.slots.tolist() == [3, 0, 4, 2, 1]
    arrays = lists.arrays()
    assert arrays["sum_rows"].tolist() == [0, 1, 3]
    assert arrays["sum_starts"].tolist() == [0, 1, 2, 5]
    assert arrays["slot_units"].tolist() == [2, 7, 7, 2, 5]
    assert arrays["tile_units"].tolist() == [2, 5, 7]
    assert arrays["tile_counts"].tolist() == [2, 1, 2]
    assert {array.dtype for name, array in arrays.items() if name != "weights"} == {np.dtype(np.int32)}


def test_padding_stands_behind_the_content() -> None:
    lists = list_entries(np.array([1, 1]), np.array([0, 0]))
    padded = {name: pad_entries(name, array, 4).tolist() for name, array in lists.arrays().items()}
    assert padded["sum_rows"] == [0, -1, -1, -1]
    assert padded["sum_starts"] == [0, 2, 2, 2]
    assert padded["slot_units"] == [1, 1, -1, -1]
    assert padded["tile_counts"] == [2, 0, 0, 0]
    with pytest.raises(ValueError, match="tile_units: 1 do not fit in 0"):
        pad_entries("tile_units", lists.tile_units, 0)
    with pytest.raises(ValueError, match="tile_units: 3 is not a power of two"):
        DeviceEntries.copy_of(lists, CPU, tiles=3)


def test_no_entries_make_no_tiles() -> None:
    none = np.empty(0, dtype=np.int64)
    lists: EntryLists = list_entries(none, none)
    assert not any(len(array) for array in lists.arrays().values())
    assert DeviceEntries.copy_of(lists, CPU, entries=4, tiles=2).tile_counts.tolist() == [0, 0]


def test_a_width_alone_decides_how_an_input_is_split() -> None:
    assert [split_count(width) for width in (64, 512, 513, 4096, 14336)] == [1, 1, 2, 8, 28]


@pytest.mark.parametrize("adapters", [1, 64, 256])
def test_the_host_lists_256_rows_quickly(adapters: int) -> None:
    units, rows = np.arange(256) % adapters, np.arange(256)
    taken = []
    for _ in range(50):
        start = time.perf_counter()
        list_entries(units, rows)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.0002, f"{1e6 * min(taken):.0f} us"
