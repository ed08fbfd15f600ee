"""The table of resident adapters, and how much work the kernels do, counted on the host."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.adapter_table import TableCapacity, TableFull
from loraplex.kernels.lora_tiles import StepTiles, Work, split_count

CPU = torch.device("cpu")
POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed")


def draw(kind: str, rows: int, adapters: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The adapter of each row."""
    random = np.random.default_rng(11)
    return {
        "distinct": np.arange(rows) % adapters,
        "uniform": random.integers(0, adapters, rows),
        "zipf": np.minimum(random.zipf(1.5, rows), adapters) - 1,
        "identical": np.zeros(rows, dtype=np.int64),
        "skewed": np.where(np.arange(rows) < rows - 2, 0, np.arange(rows) % adapters),
    }[kind]


def useful_blocks(work: Work) -> tuple[int, int]:
    """Blocks of the two launches that belong to a tile with entries, from the arrays that the kernels read."""
    return int(work.shrink_starts[-1]), int(work.expand_starts[-1])


@pytest.fixture(scope="module")
def ranked() -> list[int]:
    return [1, 3, 8, 16, 64, 128, 256, 8, 16, 16] * 4


@pytest.mark.parametrize("kind", POPULARITY)
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_decode_reads_each_adapter_about_once_and_launches_no_idle_block(
    make_pool: Any, make_table: Any, ranked: list[int], kind: str, rows: int
) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load({"q_proj": rank, "v_proj": rank}) for rank in ranked]
    table, group = make_table(pool, adapters), pool.widths.groups["qkv"]
    drawn = draw(kind, rows, len(adapters))
    units = np.array([table.unit_of(adapters[i]) for i in drawn])
    tiles = StepTiles(units, np.arange(rows), CPU)
    work = tiles.work(table, 0, group)
    ranks = np.array([2 * ranked[i] for i in set(drawn.tolist())])
    columns = 1 + 1
    assert useful_blocks(work) == (work.shrink_blocks, work.expand_blocks)
    # Least possible: each distinct adapter's rank rows in blocks of 16, and its sites' output chunks.
    assert work.shrink_blocks <= 1.3 * int((-(-ranks // 16)).sum()) * work.parts
    assert work.expand_blocks <= 1.3 * columns * len(ranks)
    counted = int(tiles.tile_counts.sum())
    assert counted == rows
    bytes_once = int(ranks.sum()) * 128
    read = sum(2 * ranked[adapters.index(a)] * 128 for a in _tile_adapters(tiles, table, adapters))
    assert read <= 1.15 * bytes_once


def _tile_adapters(tiles: StepTiles, table: Any, adapters: list[Any]) -> list[Any]:
    by_unit = {table.unit_of(adapter): adapter for adapter in adapters}
    return [by_unit[int(u)] for u, count in zip(tiles.tile_units, tiles.tile_counts) if count]


@pytest.mark.parametrize("base_rows", [0, 7, 300])
def test_blocks_depend_on_the_work_present_and_on_nothing_configured(
    make_pool: Any, make_table: Any, base_rows: int
) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load({"q_proj": 8}), pool.load({"k_proj": 40, "v_proj": 1}), pool.load({"o_proj": 256})]
    found = []
    for capacity in (TableCapacity(8, 40, 200), TableCapacity(4000, 9000, 2000)):
        table = make_table(pool, adapters, capacity)
        units = np.array([table.unit_of(adapter) for adapter in adapters])
        tiles = StepTiles(units, base_rows + np.arange(3), CPU)
        work = tiles.work(table, 0, pool.widths.groups["qkv"])
        found.append((work.shrink_blocks, work.expand_blocks, work.low_size))
    assert found == [(1 + 3, 1 + 2, 8 + 41)] * 2


def test_rows_of_a_tile_lie_without_padding_in_the_low_rank_buffer(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load({"o_proj": rank}) for rank in (3, 70)]
    table = make_table(pool, adapters)
    units = np.array([table.unit_of(adapters[i]) for i in (1, 0, 0, 1, 1)])
    work = StepTiles(units, np.arange(5), CPU).work(table, 0, pool.widths.groups["o"])
    assert work.low_size == 2 * 3 + 3 * 70
    assert work.low_starts.tolist() == [0, 6]


@pytest.mark.parametrize("rows", [17, 64, 257, 1000])
def test_a_prefill_chunk_is_cut_into_whole_tiles(make_pool: Any, make_table: Any, rows: int) -> None:
    pool = make_pool(num_layers=1)
    adapter = pool.load({"o_proj": 4})
    table = make_table(pool, [adapter])
    tiles = StepTiles(np.full(rows, table.unit_of(adapter)), np.arange(rows), CPU)
    counts = tiles.tile_counts.numpy()
    assert counts.sum() == rows
    assert tiles.num_tiles == -(-rows // tiles.block_rows)
    firsts = tiles.tile_firsts.numpy()[: tiles.num_tiles]
    assert np.array_equal(firsts, np.arange(tiles.num_tiles) * tiles.block_rows)


def test_a_removed_adapter_leaves_room_for_another(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=2)
    first, second, third = (pool.load({"q_proj": rank}) for rank in (4, 8, 8))
    size = len(first.pages)
    table = make_table(pool, [first, second], TableCapacity(units=2, records=4, pages=2 * max(size, len(second.pages))))
    addresses = [tensor.data_ptr() for tensor in table.tensors]
    with pytest.raises(TableFull, match="units: 1 in one run are needed, 0 are free"):
        table.add(third)
    unit = table.unit_of(second)
    table.remove(second)
    assert (table.record_of[unit] == -1).all()
    table.add(third)
    assert table.unit_of(third) == unit
    assert table.ranks(np.array([unit]), 0, 0, 3).tolist() == [[8, 0, 0]]
    assert [tensor.data_ptr() for tensor in table.tensors] == addresses


def test_a_failed_entry_takes_nothing(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=1)
    large, small = pool.load(64), pool.load({"q_proj": 1})
    table = make_table(pool, [], TableCapacity(units=1, records=2, pages=len(small.pages)))
    with pytest.raises(TableFull, match="pages"):
        table.add(large)
    table.add(small)
    assert table.unit_of(small) == 0


def test_sites_of_a_group_must_follow_one_another(make_pool: Any, make_table: Any) -> None:
    table = make_table(make_pool(num_layers=1))
    assert table.first_site(("k_proj", "v_proj"), 0) == 1
    with pytest.raises(ValueError, match="do not follow one another"):
        table.first_site(("q_proj", "v_proj"), 0)


def test_a_width_alone_decides_how_an_input_is_split() -> None:
    assert [split_count(width) for width in (64, 512, 513, 4096, 14336)] == [1, 1, 2, 8, 28]


def test_the_host_prepares_a_step_of_256_rows_quickly(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load({"q_proj": 1 + i % 9}) for i in range(64)]
    table, groups = make_table(pool, adapters), list(pool.widths.groups.values())
    units = np.array([table.unit_of(adapters[i % 64]) for i in range(256)])
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        tiles = StepTiles(units, np.arange(256), CPU)
        for group in groups:
            tiles.work(table, 0, group)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.003, f"{1e6 * min(taken):.0f} us"
