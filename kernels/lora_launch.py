"""The Triton kernels of the low-rank work as ``torch.library`` operators, and the step at one group of sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import CHUNK, SiteGroup
from loraplex.kernels.lora_tiles import SHRINK_RANKS, SPLIT_CHUNKS, DeviceTiles, RowSums, StepTiles, Work, split_count
from loraplex.kernels.lora_triton import expand_kernel, row_sum_kernel, shrink_kernel
from loraplex.kernels.triton_runtime import INTERPRETED

Tensors = list[torch.Tensor]

EXPAND_RANKS = 32
"""Rank rows that expand multiplies at a time."""

SUM_COLUMNS = 512
"""Columns of a block of row sums."""

SHRINK_WARPS = {16: 4, 64: 4, 128: 4}
EXPAND_WARPS = {16: 8, 64: 8, 128: 8}
"""Warps of a block by the entries of a tile: as many as keep its sums in registers."""

SUM_WARPS = 4

MAX_BLOCKS = 16_384
"""Thread blocks of a launch at most; each then does several blocks of work in turn."""

_library = torch.library.Library("loraplex", "FRAGMENT")
_library.define(
    "paged_shrink(Tensor x, Tensor chunks, Tensor[] table, Tensor x_rows, Tensor[] tiles, int low_size, int parts,"
    " int blocks, int block_rows, int layer, int page_chunks, int[] group) -> Tensor"
)
_library.define(
    "paged_expand(Tensor(a!) to, Tensor base, Tensor? bias, Tensor low, Tensor chunks, Tensor[] table, Tensor[] rows,"
    " Tensor[] tiles, int blocks, int block_rows, int layer, int page_chunks, int[] group, bool as_deltas,"
    " bool base_by_entry, bool gains) -> ()"
)
_library.define("sum_deltas(Tensor(a!) y, Tensor deltas, Tensor[] sums, Tensor[] table, int layer, int[] group) -> ()")


def add_paged_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    tiles: StepTiles | DeviceTiles,
    layer: int | None,
    group: SiteGroup,
    *,
    bias: torch.Tensor | None = None,
    gain_base: torch.Tensor | None = None,
    work: Work | None = None,
) -> None:
    """Add the low-rank work of a step at a group of sites in place, as ``lora.add_lora`` does.

    Args:
        y: [rows, sum of the group's out_features], the base products; rows without an entry are not touched.
        x: [rows, in_features], the group's input, same dtype.
        chunks: [num_chunks, 128], the arena (of one layer for layer sites, whole for model sites), same dtype.
        table: of the adapters.
        tiles: of the step.
        layer: of the group; None for model sites.
        bias: [sum of out_features] that is in ``y`` and that gains leave alone.
        gain_base: [entries in the order of ``tiles``, sum of out_features], the base products that gains multiply, bias
            included; the rows of ``y`` by default.
        work: of ``tiles`` at this group, where it is known; it must be where the device made them.
    """
    if work is None:
        assert isinstance(tiles, StepTiles)
        work = tiles.work(table, layer, group)
    if not work.shrink_blocks:
        return
    at = table.num_layers if layer is None else layer
    sizes = [table.first_site(group.sites, layer), group.in_features, *group.out_features]
    tile_arrays = [tiles.tile_units, tiles.tile_firsts, tiles.tile_counts]
    low = torch.ops.loraplex.paged_shrink(
        x,
        chunks,
        table.tensors,
        tiles.rows.x_rows,
        [*tile_arrays, work.shrink_starts, work.low_starts],
        work.low_size,
        work.parts,
        work.shrink_blocks,
        tiles.block_rows,
        at,
        table.page_chunks,
        sizes,
    )
    to = y if tiles.sums is None else y.new_empty((len(tiles.rows.slots), y.shape[1]), dtype=torch.float32)
    torch.ops.loraplex.paged_expand(
        to,
        y.new_empty(0) if gain_base is None and tiles.sums is None else y if gain_base is None else gain_base,
        bias,
        low,
        chunks,
        table.tensors,
        [tiles.rows.y_rows, tiles.rows.slots, tiles.rows.weights],
        [*tile_arrays, work.expand_starts, work.low_starts],
        work.expand_blocks,
        tiles.block_rows,
        at,
        table.page_chunks,
        sizes,
        tiles.sums is not None,
        gain_base is not None,
        work.has_gains,
    )
    if tiles.sums is not None:
        torch.ops.loraplex.sum_deltas(y, to, _sum_arrays(tiles.sums), table.tensors, at, sizes)


def _sum_arrays(sums: RowSums) -> Tensors:
    return [sums.rows, sums.starts, sums.slot_units]


def _is_wide(dtype: torch.dtype) -> bool:
    return INTERPRETED and dtype != torch.float32


def _layer_chunks(chunks: torch.Tensor, num_layers: int, layer: int) -> int:
    """Chunks of each layer where ``chunks`` is the whole arena, else 0."""
    return chunks.shape[0] // num_layers if layer == num_layers else 0


def _widths(group: Sequence[int]) -> tuple[int, int, int]:
    widths = [*group[2:], 0, 0]
    return widths[0], widths[1], widths[2]


def _shrink(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    x_rows: torch.Tensor,
    tiles: Tensors,
    low_size: int,
    parts: int,
    blocks: int,
    block_rows: int,
    layer: int,
    page_chunks: int,
    group: list[int],
) -> torch.Tensor:
    pages, first_page, record_of, records, _ = table
    units, firsts, counts, starts, low_starts = tiles
    num_layers = record_of.shape[1] - 1
    low = x.new_empty((parts, low_size), dtype=torch.float32)
    shrink_kernel[(min(blocks, MAX_BLOCKS),)](
        low,
        x,
        chunks,
        pages,
        first_page,
        record_of,
        records,
        x_rows,
        units,
        firsts,
        counts,
        starts,
        low_starts,
        low_size,
        x.stride(0),
        layer,
        num_layers,
        _layer_chunks(chunks, num_layers, layer),
        first_site=group[0],
        num_sites=len(group) - 2,
        table_sites=records.shape[1],
        in_features=group[1],
        parts=parts,
        splits=split_count(group[1]),
        split_chunks=min(SPLIT_CHUNKS, -(-group[1] // CHUNK)),
        page_chunks=page_chunks,
        striped=layer == num_layers,
        tiles=len(units),
        block_rows=block_rows,
        block_ranks=SHRINK_RANKS,
        wide=_is_wide(x.dtype),
        num_warps=SHRINK_WARPS[block_rows],
        enable_fp_fusion=False,
    )
    return low


def _expand(
    to: torch.Tensor,
    base: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    rows: Tensors,
    tiles: Tensors,
    blocks: int,
    block_rows: int,
    layer: int,
    page_chunks: int,
    group: list[int],
    as_deltas: bool,
    base_by_entry: bool,
    gains: bool,
) -> None:
    pages, first_page, record_of, records, scales = table
    y_rows, slots, weights = rows
    units, firsts, counts, starts, low_starts = tiles
    num_layers = record_of.shape[1] - 1
    # An operator may not alias what it changes, so an empty base stands for the output itself.
    base = base if base.numel() else to
    out_0, out_1, out_2 = _widths(group)
    expand_kernel[(min(blocks, MAX_BLOCKS),)](
        to,
        base,
        to if bias is None else bias,
        low,
        chunks,
        pages,
        first_page,
        record_of,
        records,
        scales,
        y_rows,
        slots,
        weights,
        units,
        firsts,
        counts,
        starts,
        low_starts,
        low.shape[1],
        to.stride(0),
        base.stride(0),
        layer,
        num_layers,
        _layer_chunks(chunks, num_layers, layer),
        first_site=group[0],
        num_sites=len(group) - 2,
        table_sites=records.shape[1],
        out_0=out_0,
        out_1=out_1,
        out_2=out_2,
        parts=low.shape[0],
        page_chunks=page_chunks,
        striped=layer == num_layers,
        tiles=len(units),
        block_rows=block_rows,
        block_ranks=EXPAND_RANKS,
        as_deltas=as_deltas,
        base_by_entry=base_by_entry,
        biased=bias is not None,
        gains=gains,
        wide=_is_wide(chunks.dtype),
        num_warps=EXPAND_WARPS[block_rows],
        enable_fp_fusion=False,
    )


def _sum_deltas(
    y: torch.Tensor, deltas: torch.Tensor, sums: Tensors, table: Tensors, layer: int, group: list[int]
) -> None:
    rows, starts, slot_units = sums
    _, _, record_of, records, _ = table
    out_0, out_1, out_2 = _widths(group)
    jobs = len(rows) * sum(-(-width // SUM_COLUMNS) for width in group[2:])
    row_sum_kernel[(min(jobs, MAX_BLOCKS),)](
        y,
        deltas,
        rows,
        starts,
        slot_units,
        record_of,
        records,
        len(rows),
        y.stride(0),
        deltas.stride(0),
        layer,
        record_of.shape[1] - 1,
        first_site=group[0],
        table_sites=records.shape[1],
        out_0=out_0,
        out_1=out_1,
        out_2=out_2,
        block_columns=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )


def _shrink_fake(*arguments: Any) -> torch.Tensor:
    x, *_ = arguments
    low_size, parts = arguments[5:7]
    low: torch.Tensor = x.new_empty((parts, low_size), dtype=torch.float32)
    return low


def _changes_in_place(*_: object) -> None:
    return None


torch.library.register_fake("loraplex::paged_shrink", _shrink_fake)
torch.library.register_fake("loraplex::paged_expand", _changes_in_place)
torch.library.register_fake("loraplex::sum_deltas", _changes_in_place)
for _name, _launch in (("paged_shrink", _shrink), ("paged_expand", _expand), ("sum_deltas", _sum_deltas)):
    _library.impl(_name, _launch, "CPU" if INTERPRETED else "CUDA")
