"""Mixtures with routers of their own at each linear, on the device: scores, choice, sorting, and the experts' work.

Everything that varies from step to step lies in tensors; the host knows the rows, and how many experts a row has at
most, and reads nothing back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_launch import Tensors
from loraplex.kernels.lora_rows import CHUNK, SiteGroup
from loraplex.kernels.lora_tiles import (
    EXPAND_COLUMNS,
    SHRINK_RANKS,
    DeviceTiles,
    RowSums,
    StepRows,
    StepTiles,
    Work,
    choose_block_rows,
    split_count,
)
from loraplex.kernels.route_triton import (
    choose_kernel,
    count_blocks_kernel,
    router_scores_kernel,
    sort_slots_kernel,
)
from loraplex.kernels.router_plan import RoutedRows
from loraplex.kernels.triton_runtime import INTERPRETED

MAX_SLOTS = 4096
"""Rows times experts of a step at most: their blocks are counted by one program."""

SORT_BLOCK = 32

ROUTER_ROWS = 16
"""Rows that a block scores; in float32, more of them do not fit in registers."""

_library = torch.library.Library("loraplex", "FRAGMENT")
_library.define(
    "route_on_device(Tensor x, Tensor chunks, Tensor[] table, Tensor routers, Tensor[] tiles, Tensor[] entries,"
    " Tensor[] rules, int most, int max_experts, int block_rows, int layer, int router_site, int page_chunks)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sort_on_device(Tensor slot_units, Tensor slot_weights, Tensor slot_rows, Tensor[] table, int block_rows,"
    " int layer, int parts, int[] group) -> (Tensor[])"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the routers of one site chose, on the device.

    Attributes:
        experts: [n, most] int32, best first, in the order of ``RoutedStep.tiles``.
        weights: [n, most] float32, without those of a mix; 0 where an expert is not chosen.
        tiles: the chosen experts' entries.
        work: theirs at the group.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    tiles: DeviceTiles
    work: Work


class RoutedStep:
    """Rows of one step whose adapters have routers of one scope.

    Args:
        parts: by adapter; a row may come under several adapters of a mix.
        table: that has all of them.
        device: of the kernels.

    Raises:
        ValueError: where there are more rows times experts than ``MAX_SLOTS``.
    """

    def __init__(self, parts: Sequence[RoutedRows], table: AdapterTable, device: torch.device) -> None:
        lengths = [len(part.rows) for part in parts]
        rows = np.concatenate([part.rows for part in parts])
        routings = [part.routing for part in parts]
        self._table = table
        self.tiles = StepTiles(
            np.repeat([table.unit_of(part.adapter) for part in parts], lengths),
            rows,
            device,
            weights=np.repeat(np.array([part.weight for part in parts], dtype=np.float32), lengths),
            block_rows=ROUTER_ROWS,
        )
        self.most = max(routing.limit for routing in routings)
        self.max_experts = max(routing.num_experts for routing in routings)
        if len(rows) * self.most > MAX_SLOTS:
            raise ValueError(f"parts: {len(rows)} rows of up to {self.most} experts are more than {MAX_SLOTS}")

        def by_row(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return (
                torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(lengths))[self.tiles.order].to(device)
            )

        self.rules = [
            by_row([routing.limit for routing in routings], torch.int32),
            by_row([routing.renormalize for routing in routings], torch.int32),
            by_row([math.inf if r.top_p is None else r.top_p for r in routings], torch.float32),
            by_row([r.temperature if r.temperature > 0 else 1.0 for r in routings], torch.float32),
        ]
        units = np.repeat([table.unit_of(part.adapter) for part in parts], lengths)[self.tiles.order]
        self.entry_units = torch.from_numpy(units.astype(np.int32)).to(device)
        by_slot = np.sort(rows, kind="stable")
        starts = np.append(np.flatnonzero(np.diff(by_slot, prepend=-1)), len(rows))
        self.slot_rows = torch.from_numpy(np.repeat(by_slot, self.most).astype(np.int32)).to(device)
        self._rows = torch.from_numpy(by_slot[starts[:-1]].astype(np.int32)).to(device)
        self._starts = torch.from_numpy((starts * self.most).astype(np.int32)).to(device)
        self._longest = max(lengths)

    def choose(
        self, layer: int, router: str, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup, max_rank: int
    ) -> Chosen:
        """Route all rows and list the chosen experts' work at a group.

        Args:
            router: what it routes: a site, or a feed-forward network by any other name.
            x: [rows, in_features], what the router reads.
            chunks: [num_chunks, 128], the arena of the layer.
            group: where the experts work.
            max_rank: the largest sum of ranks of an expert at the group.
        """
        table = self._table
        known = table.layer_sites
        site = known.index(router) if router in known else table.num_sites
        experts, weights, units, slot_weights = torch.ops.loraplex.route_on_device(
            x,
            chunks,
            table.tensors,
            table.routers,
            [self.tiles.tile_units, self.tiles.tile_firsts, self.tiles.tile_counts],
            [self.entry_units, self.tiles.rows.x_rows, self.tiles.rows.slots, self.tiles.rows.weights],
            self.rules,
            self.most,
            self.max_experts,
            self.tiles.block_rows,
            layer,
            site,
            table.page_chunks,
        )
        block_rows = choose_block_rows(self._longest)
        parts = split_count(group.in_features)
        sizes = [table.first_site(group.sites, layer), *group.out_features]
        sorted_slots = torch.ops.loraplex.sort_on_device(
            units, slot_weights, self.slot_rows, table.tensors, block_rows, layer, parts, sizes
        )
        rows, tile_arrays, (shrink, expand, low) = sorted_slots[:4], sorted_slots[4:7], sorted_slots[7:]
        tiles = DeviceTiles(StepRows(*rows), RowSums(self._rows, self._starts, units), block_rows, *tile_arrays)
        slots = len(units)
        columns = sum(-(-width // EXPAND_COLUMNS) for width in group.out_features)
        rank_blocks = -(-max_rank // SHRINK_RANKS) * parts
        # As many blocks as could have work; the kernels stop at those that have.
        work = Work(shrink, expand, low, slots * max_rank, slots * rank_blocks, slots * columns, parts, True)
        return Chosen(experts, weights, tiles, work)


def _route(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    routers: torch.Tensor,
    tiles: Tensors,
    entries: Tensors,
    rules: Tensors,
    most: int,
    max_experts: int,
    block_rows: int,
    layer: int,
    router_site: int,
    page_chunks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pages, first_page, record_of, _, _ = table
    tile_units, tile_firsts, tile_counts = tiles
    entry_units, x_rows, slots, mix_weights = entries
    count, num_layers = len(entry_units), record_of.shape[1] - 1
    wide_chunk = CHUNK * chunks.element_size() // 4
    in_chunks = -(-x.shape[1] // wide_chunk)
    split_chunks = min(8, in_chunks)
    splits = -(-in_chunks // split_chunks)
    block_experts = max(16, 1 << (max_experts - 1).bit_length())
    site = {"router_site": router_site, "router_sites": routers.shape[1], "block_experts": block_experts}
    scores = x.new_empty((splits, count, block_experts), dtype=torch.float32)
    router_scores_kernel[(len(tile_units) * splits,)](
        scores,
        x,
        chunks.view(torch.float32),
        pages,
        first_page,
        record_of,
        routers,
        x_rows,
        tile_units,
        tile_firsts,
        tile_counts,
        count,
        x.stride(0),
        layer,
        num_layers,
        in_features=x.shape[1],
        splits=splits,
        split_chunks=split_chunks,
        wide_chunk=wide_chunk,
        page_chunks=page_chunks,
        block_rows=block_rows,
        num_warps=4,
        **site,
    )
    experts, weights, slot_units, slot_weights = _route_buffers(x, count, most)
    choose_kernel[(count,)](
        experts,
        weights,
        slot_units,
        slot_weights,
        scores,
        entry_units,
        slots,
        mix_weights,
        *rules,
        record_of,
        routers,
        count,
        layer,
        num_layers,
        splits=splits,
        most=most,
        num_warps=1,
        **site,
    )
    return experts, weights, slot_units, slot_weights


def _route_buffers(
    x: torch.Tensor, count: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty((count, most), dtype=torch.int32),
        x.new_empty((count, most), dtype=torch.float32),
        x.new_empty((count * most,), dtype=torch.int32),
        x.new_empty((count * most,), dtype=torch.float32),
    )


def _sort(
    slot_units: torch.Tensor,
    slot_weights: torch.Tensor,
    slot_rows: torch.Tensor,
    table: Tensors,
    block_rows: int,
    layer: int,
    parts: int,
    group: list[int],
) -> Tensors:
    _, _, record_of, records, _ = table
    slots = len(slot_units)
    found = _sort_buffers(slot_units, slot_weights)
    sort_slots_kernel[(-(-slots // SORT_BLOCK),)](
        *found[:7], slot_units, slot_weights, slot_rows, slots, block_rows=block_rows, block=SORT_BLOCK, num_warps=4
    )
    columns = [-(-width // EXPAND_COLUMNS) for width in group[1:]] + [0, 0]
    count_blocks_kernel[(1,)](
        *found[7:],
        found[4],
        found[6],
        record_of,
        records,
        slots,
        layer,
        record_of.shape[1] - 1,
        first_site=group[0],
        num_sites=len(group) - 1,
        table_sites=records.shape[1],
        columns_0=columns[0],
        columns_1=columns[1],
        columns_2=columns[2],
        parts=parts,
        block_ranks=SHRINK_RANKS,
        tiles=len(found[4]),
        num_warps=8,
    )
    return found


def _sort_buffers(slot_units: torch.Tensor, slot_weights: torch.Tensor) -> Tensors:
    slots = len(slot_units)
    tiles = 1 << max(slots - 1, 1).bit_length()
    sizes = [slots, slots, slots, tiles, tiles, tiles, tiles + 1, tiles + 1, tiles]
    arrays = [slot_units.new_zeros((size,)) for size in sizes]
    return [*arrays[:3], torch.zeros_like(slot_weights), *arrays[3:]]


def _route_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _route_buffers(arguments[0], len(arguments[5][0]), arguments[7])


def _sort_fake(slot_units: torch.Tensor, slot_weights: torch.Tensor, *_: object) -> Tensors:
    return _sort_buffers(slot_units, slot_weights)


torch.library.register_fake("loraplex::route_on_device", _route_fake)
torch.library.register_fake("loraplex::sort_on_device", _sort_fake)
for _name, _launch in (("route_on_device", _route), ("sort_on_device", _sort)):
    _library.impl(_name, _launch, "CPU" if INTERPRETED else "CUDA")
