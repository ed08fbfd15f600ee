"""How the low-rank kernels are launched at a group of sites, and the host's count of what their blocks do.

A launch is fixed by facts that the host knows without reading the device: capacities, and what the table holds. How
many of its blocks have work is counted on the device; ``count_blocks`` counts the same from lists, as the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import CHUNK, Int64Array, SiteGroup
from loraplex.kernels.lora_tiles import EntryLists, Int32Array, split_count
from loraplex.kernels.lora_tuning import ExpandShape, ShrinkShape, choose_expand, choose_shrink
from loraplex.kernels.triton_runtime import INTERPRETED

SUMMED_IN_EXPAND = 256
"""Up to so many entries, expand sums the partial sums of shrink itself; of more, they are summed once before."""

MOST_PARTIAL_BYTES = 128 << 20
"""Of partial sums. Where they were more, shrink sums over the whole input, in fewer and longer blocks."""

WARPS_OF_PROCESSOR = 32
"""Of a launch on a multiprocessor at most: twice as many as registers let run at once. More would only be launched to
find that there is no work for them, where a captured launch has room for more than a step has."""


@dataclass(frozen=True, slots=True)
class GroupLaunch:
    """What is fixed in the launches at a group, in all layers.

    Attributes:
        group: its sites and widths.
        first_site: of the table's.
        idle: whether no adapter has any of its sites, so that there is nothing to launch.
        rank: rank rows that an entry has room for in the low-rank intermediate.
        parts: partial sums that shrink leaves: one per split, or 1 where it adds them itself.
        sums_first: whether partial sums are summed before expand rather than in it.
        shrink, expand: shapes of the blocks.
    """

    group: SiteGroup
    first_site: int
    idle: bool
    rank: int
    parts: int
    sums_first: bool
    shrink: ShrinkShape
    expand: ExpandShape

    @classmethod
    def at(
        cls, table: AdapterTable, layer: int | None, group: SiteGroup, *, bits: int, entries: int, block_rows: int
    ) -> GroupLaunch:
        """For so many entries (the capacity), of a dtype of so many bits; ``layer`` None: of model sites."""
        rank = table.group_rank(group.sites, layer)
        splits = split_count(group.in_features)
        parts = splits if 4 * splits * entries * rank <= MOST_PARTIAL_BYTES else 1
        return cls(
            group,
            table.first_site(group.sites, layer),
            not table.adapts(group.sites, layer),
            rank,
            parts,
            parts > 1 and entries > SUMMED_IN_EXPAND,
            choose_shrink(bits, rank, group.in_features, block_rows),
            choose_expand(bits, rank, max(group.out_features), block_rows),
        )

    @property
    def facts(self) -> list[int]:
        """First site, rank rows of a block, blocks of columns of each of three sites (0: there is none)."""
        columns = [-(-width // self.expand.columns) for width in self.group.out_features]
        return [self.first_site, self.shrink.ranks, *columns, *[0] * (3 - len(columns))]

    def most_blocks(self, tiles: int) -> tuple[int, int]:
        """Blocks of rank rows (shrink has each once a part) and of columns that so many tiles may have."""
        return tiles * -(-self.rank // self.shrink.ranks), tiles * sum(self.facts[2:])


def resident_programs(device: torch.device, warps: int) -> int:
    """Programs of so many warps that a GPU has room for at once; more of them do their work in no less time.

    The interpreter has two, so that programs come to loop over their work.
    """
    if INTERPRETED or device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * (WARPS_OF_PROCESSOR // warps)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """What a step does at a group of sites of a layer.

    Attributes:
        shrink, expand: blocks that have work.
        shrink_programs, expand_programs: thread blocks launched for them.
        bytes_once: of the adapters' matrices, each distinct unit's once.
        bytes_loaded: of them, as the tiles load them from the pool.
    """

    shrink: int
    expand: int
    shrink_programs: int
    expand_programs: int
    bytes_once: int
    bytes_loaded: int


def count_blocks(
    lists: EntryLists,
    table: AdapterTable,
    layer: int | None,
    group: SiteGroup,
    *,
    dtype: torch.dtype = torch.bfloat16,
    most_programs: int | None = None,
    capacity: tuple[int, int] | None = None,
) -> BlockCounts:
    """Count from a step's lists.

    Args:
        most_programs: of a launch; as many as there is work for by default.
        capacity: entries and tiles that a captured launch was made for; None: launched for these lists alone.
    """
    entries, tiles = capacity or (len(lists.order), len(lists.tile_units))
    launch = GroupLaunch.at(table, layer, group, bits=dtype.itemsize * 8, entries=entries, block_rows=lists.block_rows)
    shrink, expand = count_by_tile(lists, table, layer, launch)
    useful = (int(shrink.sum()) * launch.parts, int(expand.sum()))
    rank_blocks, column_blocks = launch.most_blocks(tiles)
    most = useful if capacity is None or launch.idle else (rank_blocks * launch.parts, column_blocks)
    shrink_programs, expand_programs = (min(blocks, most_programs or blocks) for blocks in most)
    sizes = _unit_bytes(lists.tile_units, table, layer, group, dtype)
    _, firsts = np.unique(lists.tile_units, return_index=True)
    return BlockCounts(*useful, shrink_programs, expand_programs, int(sizes[firsts].sum()), int(sizes.sum()))


def count_by_tile(
    lists: EntryLists, table: AdapterTable, layer: int | None, launch: GroupLaunch
) -> tuple[Int64Array, Int64Array]:
    """Blocks of each tile: of rank rows, of which shrink has one for each part; and of columns."""
    ranks = table.ranks(lists.tile_units, layer, launch.first_site, len(launch.group.sites)).astype(np.int64)
    columns = np.array(launch.facts[2 : 2 + len(launch.group.sites)])
    return -(-ranks.sum(axis=1) // launch.shrink.ranks), ((ranks > 0) * columns).sum(axis=1)


def count_by_column(lists: EntryLists, table: AdapterTable, launch: GroupLaunch) -> tuple[Int64Array, Int64Array]:
    """[columns] blocks of rank rows (of one part) and of columns in every column of the table."""
    ranks = table.ranks_by_column(lists.tile_units, launch.first_site, len(launch.group.sites)).astype(np.int64)
    columns = np.array(launch.facts[2 : 2 + len(launch.group.sites)])
    shrink: Int64Array = (-(-ranks.sum(axis=2) // launch.shrink.ranks)).sum(axis=0)
    expand: Int64Array = ((ranks > 0) * columns).sum(axis=(0, 2))
    return shrink, expand


def _unit_bytes(
    units: Int32Array, table: AdapterTable, layer: int | None, group: SiteGroup, dtype: torch.dtype
) -> Int64Array:
    """Bytes of A and B of units, in whole chunks, as they lie in the pool."""
    ranks = table.ranks(units, layer, table.first_site(group.sites, layer), len(group.sites)).astype(np.int64)
    chunks = group.in_chunks + np.array(group.out_chunks, dtype=np.int64)
    sizes: Int64Array = (ranks * chunks).sum(axis=1) * CHUNK * dtype.itemsize
    return sizes
