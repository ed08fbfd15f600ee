"""The Triton kernels of the low-rank work as ``torch.library`` operators.

Common arguments: ``table``: ``AdapterTable.tensors``; ``tiles``: units, first entries, counts and the starts of
``StepWork``, of which those of the launch begin at ``starts_at``; ``place``: column, chunks of a page; ``sizes``: the
group's first site, width of its input, widths of its outputs; ``shape``: of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loraplex.kernels.lora_expand import expand_kernel, row_sum_kernel, sum_partial_kernel
from loraplex.kernels.lora_tiles import SPLIT_CHUNKS, split_count
from loraplex.kernels.lora_triton import count_work_kernel, lookup_kernel, shrink_kernel
from loraplex.kernels.triton_runtime import INTERPRETED

Tensors = list[torch.Tensor]

FACTS = 5
"""Of a group in ``count_work`` (see ``GroupLaunch.facts``)."""

SUM_COLUMNS = 512
"""Columns of a block of row sums."""

SUM_WARPS = 4

SUM_PROGRAMS = 8192
"""Of a launch of row sums at most; each then does several blocks in turn."""

COUNT_TILES = 256
"""Tiles that a block of ``count_work`` counts at a time."""

COUNT_WARPS = 4

PARTIAL_BLOCK = 1024
"""Elements of a block of ``sum_partial``."""

PITCH = 4
"""The starts of a launch begin at a multiple of so many, so that all launches are compiled alike."""

_library = torch.library.Library("loraplex", "FRAGMENT")
_library.define(
    "count_work(Tensor[] tiles, Tensor record_of, Tensor records, int[] facts, int layer_groups, int first_column,"
    " int columns) -> Tensor"
)
_library.define(
    "paged_shrink(Tensor x, Tensor chunks, Tensor[] table, Tensor x_rows, Tensor[] tiles, int starts_at, int[] place,"
    " int[] sizes, int[] shape, int programs, bool lookup) -> Tensor"
)
_library.define(
    "paged_expand(Tensor(a!) to, Tensor? base, Tensor? bias, Tensor low, Tensor chunks, Tensor[] table, Tensor[] rows,"
    " Tensor[] tiles, int starts_at, int[] place, int[] sizes, int[] shape, int programs, bool as_deltas,"
    " bool base_by_slot, bool gains) -> ()"
)
_library.define("sum_partial(Tensor low) -> Tensor")
_library.define("sum_deltas(Tensor(a!) y, Tensor deltas, Tensor[] sums, Tensor[] table, int column, int[] sizes) -> ()")


def _is_wide(dtype: torch.dtype) -> bool:
    return INTERPRETED and dtype != torch.float32


def _layer_chunks(chunks: torch.Tensor, num_layers: int, column: int) -> int:
    """Chunks of each layer where ``chunks`` is the whole arena, else 0."""
    return chunks.shape[0] // num_layers if column == num_layers else 0


def _widths(sizes: Sequence[int]) -> dict[str, int]:
    widths = [*sizes[2:], 0, 0]
    return {f"out_{site}": widths[site] for site in range(3)}


def launch_count(
    tiles: Tensors,
    record_of: torch.Tensor,
    records: torch.Tensor,
    facts: list[int],
    layer_groups: int,
    first_column: int,
    columns: int,
) -> torch.Tensor:
    starts = _starts(tiles, facts, layer_groups, columns)
    _, groups, _, pitch = starts.shape
    count_work_kernel[(columns * groups,)](
        starts,
        *tiles,
        record_of,
        records,
        first_column,
        record_of.shape[1] - 1,
        len(tiles[0]),
        pitch,
        facts=tuple(facts),
        layer_groups=layer_groups,
        all_groups=len(facts) // FACTS,
        groups=groups,
        table_sites=records.shape[1],
        block=COUNT_TILES,
        num_warps=COUNT_WARPS,
    )
    return starts


def _starts(tiles: Tensors, facts: list[int], layer_groups: int, columns: int) -> torch.Tensor:
    groups = max(layer_groups, len(facts) // FACTS - layer_groups)
    pitch = -(-(len(tiles[0]) + 1) // PITCH) * PITCH
    return tiles[0].new_empty((columns, groups, 2, pitch))


def launch_shrink(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    x_rows: torch.Tensor,
    tiles: Tensors,
    starts_at: int,
    place: list[int],
    sizes: list[int],
    shape: list[int],
    programs: int,
    lookup: bool,
) -> torch.Tensor:
    pages, first_page, record_of, records, _ = table
    column, page_chunks = place[:2]
    rank, parts, ranks, rows, chunks_at_a_time, warps, stages = shape
    num_layers = record_of.shape[1] - 1
    low = _low(x, x_rows, shape)
    common: dict[str, Any] = {
        "first_site": sizes[0],
        "num_sites": len(sizes) - 2,
        "table_sites": records.shape[1],
        "in_features": sizes[1],
        "page_chunks": page_chunks,
        "striped": column == num_layers,
        "rows": rows,
        "block_ranks": ranks,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": False,
    }
    arguments = (low, x, chunks, pages, first_page, record_of, records, x_rows, *tiles)
    scalars = (starts_at, len(x_rows) * rank, rank, x.stride(0), column, num_layers)
    layer_chunks = _layer_chunks(chunks, num_layers, column)
    if lookup:
        lookup_kernel[(programs,)](*arguments, *scalars, layer_chunks, len(tiles[0]), **common)
        return low
    shrink_kernel[(programs,)](
        *arguments,
        *scalars,
        layer_chunks,
        len(tiles[0]),
        parts=parts,
        splits=split_count(sizes[1]),
        split_chunks=SPLIT_CHUNKS,
        block_chunks=chunks_at_a_time,
        wide=_is_wide(x.dtype),
        **common,
    )
    return low


def _low(x: torch.Tensor, x_rows: torch.Tensor, shape: list[int]) -> torch.Tensor:
    rank, parts, *_ = shape
    return torch.empty((parts, len(x_rows), rank), dtype=torch.float32, device=x.device)


def launch_expand(
    to: torch.Tensor,
    base: torch.Tensor | None,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    rows: Tensors,
    tiles: Tensors,
    starts_at: int,
    place: list[int],
    sizes: list[int],
    shape: list[int],
    programs: int,
    as_deltas: bool,
    base_by_slot: bool,
    gains: bool,
) -> None:
    pages, first_page, record_of, records, scales = table
    column, page_chunks = place[:2]
    columns, ranks, rows_at_a_time, warps, stages = shape
    num_layers = record_of.shape[1] - 1
    base = to if base is None else base
    expand_kernel[(programs,)](
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
        *rows,
        *tiles,
        starts_at,
        low.stride(0),
        low.stride(1),
        to.stride(0),
        base.stride(0),
        column,
        num_layers,
        _layer_chunks(chunks, num_layers, column),
        len(tiles[0]),
        first_site=sizes[0],
        num_sites=len(sizes) - 2,
        table_sites=records.shape[1],
        **_widths(sizes),
        parts=low.shape[0],
        page_chunks=page_chunks,
        striped=column == num_layers,
        rows=rows_at_a_time,
        block_ranks=ranks,
        block_columns=columns,
        as_deltas=as_deltas,
        base_by_slot=base_by_slot,
        biased=bias is not None,
        gains=gains,
        wide=_is_wide(chunks.dtype),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=False,
    )


def launch_sum_partial(low: torch.Tensor) -> torch.Tensor:
    summed = _sum_partial_fake(low)
    sum_partial_kernel[(-(-summed.numel() // PARTIAL_BLOCK),)](
        summed, low, low.stride(0), parts=low.shape[0], block=PARTIAL_BLOCK, num_warps=4, enable_fp_fusion=False
    )
    return summed


def _sum_partial_fake(low: torch.Tensor) -> torch.Tensor:
    return low.new_empty((1, *low.shape[1:]))


def launch_sum_deltas(
    y: torch.Tensor, deltas: torch.Tensor, sums: Tensors, table: Tensors, column: int, sizes: list[int]
) -> None:
    rows, starts, slot_units = sums
    _, _, record_of, records, _ = table
    jobs = len(rows) * sum(-(-width // SUM_COLUMNS) for width in sizes[2:])
    row_sum_kernel[(min(jobs, SUM_PROGRAMS),)](
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
        column,
        record_of.shape[1] - 1,
        first_site=sizes[0],
        table_sites=records.shape[1],
        **_widths(sizes),
        block_columns=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )


def _count_fake(
    tiles: Tensors,
    record_of: torch.Tensor,
    records: torch.Tensor,
    facts: list[int],
    layer_groups: int,
    first_column: int,
    columns: int,
) -> torch.Tensor:
    return _starts(tiles, facts, layer_groups, columns)


def _shrink_fake(*arguments: Any) -> torch.Tensor:
    return _low(arguments[0], arguments[3], arguments[8])


def _changes_in_place(*_: object) -> None:
    return None


for _name, _launch, _fake in (
    ("count_work", launch_count, _count_fake),
    ("paged_shrink", launch_shrink, _shrink_fake),
    ("paged_expand", launch_expand, _changes_in_place),
    ("sum_partial", launch_sum_partial, _sum_partial_fake),
    ("sum_deltas", launch_sum_deltas, _changes_in_place),
):
    torch.library.register_fake(f"loraplex::{_name}", _fake)
    _library.impl(_name, _launch, "CPU" if INTERPRETED else "CUDA")
