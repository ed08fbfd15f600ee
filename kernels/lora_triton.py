"""Triton kernels of the low-rank work: the count of its blocks, and shrink to ``x A^T``; see ``lora_expand.py`` too.

Both products are computed transposed, with rank rows or output columns as the rows of the matrix instruction and a
tile's entries as its columns. So a row's result does not depend on how many entries stand beside it: neither the order
of its sum nor the kind of instruction changes. Sums go over chunks in ascending order within a split and over splits in
ascending order, in fp32; there are no atomics. Loops whose bounds are not constants are ``while`` loops, as Triton's
interpreter takes no tensors in ``range``. Tiles are those of ``lora_tiles.py``, records those of ``adapter_table.py``.
A program takes every n-th block; which blocks there are is read from the starts that ``count_work_kernel`` made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplex.kernels.adapter_table import FIELDS as _FIELDS
from loraplex.kernels.lora_rows import CHUNK as _CHUNK
from loraplex.kernels.triton_runtime import jit, load_fact, step_jit, tl

FIELDS = tl.constexpr(_FIELDS) if tl else _FIELDS
CHUNK = tl.constexpr(_CHUNK) if tl else _CHUNK
NO_END = tl.constexpr(2**31 - 1) if tl else 2**31 - 1

SEARCH = tl.constexpr(64) if tl else 64
"""Starts of tiles that are looked through at a time."""

VARYING = ("starts_at", "column", "first_column", "num_rows", "tiles", "pitch")
"""Integers that differ from layer to layer or from step to step."""

STEP_ARRAYS = (
    "x_rows_ptr",
    "y_rows_ptr",
    "slots_ptr",
    "weights_ptr",
    "tile_units_ptr",
    "tile_firsts_ptr",
    "tile_counts_ptr",
    "rows_ptr",
    "row_starts_ptr",
    "slot_units_ptr",
)
"""Arrays of a step, which may begin anywhere in a buffer."""


def launch_jit(kernel: Callable[..., Any]) -> Any:
    """``jit``, with one compilation for all layers, capacities and places in buffers."""
    return step_jit(numbers=VARYING, arrays=STEP_ARRAYS)(kernel)


@jit
def first_ends(starts_ptr: tl.tensor, tiles: tl.tensor) -> tl.tensor:
    """[SEARCH] where the blocks of the first tiles end, which all blocks of a launch look through."""
    tile = 1 + tl.arange(0, SEARCH)
    return tl.load(starts_ptr + tile, mask=tile <= tiles, other=NO_END, eviction_policy="evict_last")


@jit
def tile_of_block(starts_ptr: tl.tensor, ends: tl.tensor, block: tl.tensor, tiles: tl.tensor) -> tl.tensor:
    """The tile whose blocks include ``block``: how many tiles end at or before it. ``ends``: of ``first_ends``."""
    before = block * 0
    if tiles > SEARCH:
        # Among ends that lie SEARCH tiles apart, then among those from the last one found.
        begin = block * 0
        while begin < tiles:
            last = begin + SEARCH * (1 + tl.arange(0, SEARCH))
            far = tl.load(starts_ptr + last, mask=last < tiles, other=NO_END)
            before += SEARCH * tl.sum((far <= block).to(tl.int32), 0)
            begin += SEARCH * SEARCH
        tile = before + 1 + tl.arange(0, SEARCH)
        ends = tl.load(starts_ptr + tile, mask=tile <= tiles, other=NO_END)
    return before + tl.sum((ends <= block).to(tl.int32), 0)


@jit
def chunk_elements(
    pages_ptr: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    valid: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
) -> tl.tensor:
    """Where a chunk of a row begins, in elements of the arena; rows of model sites are dealt out over the layers."""
    if striped:
        layer = row % num_layers
        row = row // num_layers
    at = start + row * stride + chunk
    page = tl.load(pages_ptr + at // page_chunks, mask=valid, other=0, eviction_policy="evict_last").to(tl.int64)
    place = page * page_chunks + at % page_chunks
    if striped:
        place += layer.to(tl.int64) * layer_chunks
    return place * CHUNK


@jit
def multiply(a: tl.tensor, b: tl.tensor, acc: tl.tensor, wide: tl.constexpr) -> tl.tensor:
    """``acc + a @ b``. ``wide``: in fp32, since the interpreter multiplies bfloat16 as if it were integers."""
    if wide:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def load_rows(
    chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    has_row: tl.tensor,
    first_chunk: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    rows: tl.constexpr,
    chunks: tl.constexpr,
) -> tl.tensor:
    """[rows, chunks * 128] of the rows of a matrix: consecutive chunks of each, 0 where there are none."""
    chunk = first_chunk + tl.arange(0, chunks)
    inside = has_row[:, None] & (chunk < stride)[None, :]
    at = chunk_elements(
        pages_ptr,
        start,
        stride,
        row[:, None],
        chunk[None, :],
        inside,
        num_layers,
        layer_chunks,
        page_chunks,
        striped,
    )
    # By chunk, so that the elements of a chunk are seen to lie side by side and are loaded many at a time.
    elements = at[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
    found = tl.load(chunks_ptr + elements, mask=inside[:, :, None], other=0.0)
    return tl.reshape(found, (rows, chunks * CHUNK))


@jit
def ranks_of_unit(
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    unit: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
) -> tl.tensor:
    """The sum of a unit's ranks at a group of sites, and where the first of its A matrices begins."""
    record = load_fact(record_of_ptr + unit * (num_layers + 1) + column)
    sites_ptr = records_ptr + (record * table_sites + first_site) * FIELDS
    rank = 0
    start = 0
    for site in tl.static_range(num_sites):
        more = load_fact(sites_ptr + site * FIELDS)
        start = tl.where((rank == 0) & (more > 0), load_fact(sites_ptr + site * FIELDS + 1), start)
        rank += more
    return rank, start


@launch_jit
def count_work_kernel(
    starts_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    first_column: tl.tensor,
    num_layers: tl.tensor,
    tiles: tl.tensor,
    pitch: tl.tensor,
    facts: tl.constexpr,
    layer_groups: tl.constexpr,
    all_groups: tl.constexpr,
    groups: tl.constexpr,
    table_sites: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The first block of each tile at a group of a column, for shrink (rank rows alone) and for expand; ``block`` tiles
    at a time.

    ``facts``: of the groups of layers, then of the model's: first site, rank rows of a block, blocks of columns of
    three sites.
    """
    place = tl.program_id(0)
    column = first_column + place // groups
    group = place % groups + tl.where(column == num_layers, layer_groups, 0)
    first_site = 0
    ranks = 1
    columns_0 = 0
    columns_1 = 0
    columns_2 = 0
    for known in tl.static_range(all_groups):
        here = group == known
        first_site = tl.where(here, facts[known * 5], first_site)
        ranks = tl.where(here, facts[known * 5 + 1], ranks)
        columns_0 = tl.where(here, facts[known * 5 + 2], columns_0)
        columns_1 = tl.where(here, facts[known * 5 + 3], columns_1)
        columns_2 = tl.where(here, facts[known * 5 + 4], columns_2)
    to_ptr = starts_ptr + place * 2 * pitch
    tl.store(to_ptr, 0)
    tl.store(to_ptr + pitch, 0)
    shrink_before = 0
    expand_before = 0
    begin = 0
    while begin < tiles:
        tile = begin + tl.arange(0, block)
        inside = tile < tiles
        has_work = tl.load(tile_counts_ptr + tile, mask=inside, other=0) > 0
        unit = tl.load(tile_units_ptr + tile, mask=inside, other=0)
        record = tl.load(record_of_ptr + unit * (num_layers + 1) + column, mask=has_work, other=-1)
        rank = tl.zeros((block,), tl.int32)
        expand = tl.zeros((block,), tl.int32)
        for site in tl.static_range(3):
            columns = columns_0 if site == 0 else (columns_1 if site == 1 else columns_2)
            at = (record * table_sites + first_site + site) * FIELDS
            more = tl.load(records_ptr + at, mask=(record >= 0) & (columns > 0), other=0)
            rank += more
            expand += tl.where(more > 0, columns, 0)
        shrink = (rank + ranks - 1) // ranks
        tl.store(to_ptr + 1 + tile, shrink_before + tl.cumsum(shrink, 0), mask=inside)
        tl.store(to_ptr + pitch + 1 + tile, expand_before + tl.cumsum(expand, 0), mask=inside)
        shrink_before += tl.sum(shrink, 0)
        expand_before += tl.sum(expand, 0)
        begin += block


@launch_jit
def shrink_kernel(
    low_ptr: tl.tensor,
    x_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    x_rows_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    starts_at: tl.tensor,
    low_part: tl.tensor,
    low_stride: tl.tensor,
    x_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    tiles: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    in_features: tl.constexpr,
    parts: tl.constexpr,
    splits: tl.constexpr,
    split_chunks: tl.constexpr,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    rows: tl.constexpr,
    block_ranks: tl.constexpr,
    block_chunks: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``low[part, entry, r] = sum over the part's chunks of <A[r], x[entry]>`` for a block of rank rows of a tile.

    A tile's entries are multiplied ``rows`` at a time; what is read of A stays in the cache meanwhile.
    """
    starts_ptr += starts_at
    lane = tl.arange(0, block_chunks * CHUNK)
    steps: tl.constexpr = split_chunks // block_chunks
    in_chunks: tl.constexpr = (in_features + CHUNK - 1) // CHUNK
    near = first_ends(starts_ptr, tiles)
    total = load_fact(starts_ptr + tiles) * parts
    block = tl.program_id(0)
    while block < total:
        part = block % parts
        tile = tile_of_block(starts_ptr, near, block // parts, tiles)
        inner = block // parts - load_fact(starts_ptr + tile)
        unit = load_fact(tile_units_ptr + tile)
        first = load_fact(tile_firsts_ptr + tile)
        count = load_fact(tile_counts_ptr + tile)
        rank, start = ranks_of_unit(
            record_of_ptr, records_ptr, unit, column, num_layers, first_site, num_sites, table_sites
        )
        row = inner * block_ranks + tl.arange(0, block_ranks)
        has_row = row < rank
        unit_pages_ptr = pages_ptr + load_fact(first_page_ptr + unit)
        begin = 0
        while begin < count:
            entry = begin + tl.arange(0, rows)
            has_entry = entry < count
            x_row = tl.load(x_rows_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
            summed = tl.zeros((block_ranks, rows), tl.float32)
            acc = tl.zeros((block_ranks, rows), tl.float32)
            for step in range(splits // parts * steps):
                chunk = part * split_chunks + step * block_chunks
                a = load_rows(
                    chunks_ptr,
                    unit_pages_ptr,
                    start,
                    in_chunks,
                    row,
                    has_row,
                    chunk,
                    num_layers,
                    layer_chunks,
                    page_chunks,
                    striped,
                    block_ranks,
                    block_chunks,
                )
                feature = chunk * CHUNK + lane
                inside = has_entry[:, None] & (feature < in_features)[None, :]
                x = tl.load(x_ptr + x_row[:, None] * x_stride + feature[None, :], mask=inside, other=0.0)
                acc = multiply(a, tl.trans(x), acc, wide)
                if steps == 1:
                    summed += acc
                    acc = tl.zeros((block_ranks, rows), tl.float32)
                else:
                    ends = step % steps == steps - 1
                    summed = tl.where(ends, summed + acc, summed)
                    acc = tl.where(ends, 0.0, acc)
            low_at = part * low_part + (first + entry)[None, :] * low_stride + row[:, None]
            tl.store(low_ptr + low_at, summed, mask=has_row[:, None] & has_entry[None, :])
            begin += rows
        block += tl.num_programs(0)


@launch_jit
def lookup_kernel(
    low_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    x_rows_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    starts_at: tl.tensor,
    low_part: tl.tensor,
    low_stride: tl.tensor,
    x_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    tiles: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    in_features: tl.constexpr,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    rows: tl.constexpr,
    block_ranks: tl.constexpr,
) -> None:
    """``low[entry, r] = A[r, token[entry]]`` for a block of rank rows of a tile: shrink of a row that is one-hot."""
    starts_ptr += starts_at
    in_chunks: tl.constexpr = (in_features + CHUNK - 1) // CHUNK
    near = first_ends(starts_ptr, tiles)
    total = load_fact(starts_ptr + tiles)
    block = tl.program_id(0)
    while block < total:
        tile = tile_of_block(starts_ptr, near, block, tiles)
        unit = tl.load(tile_units_ptr + tile)
        first = tl.load(tile_firsts_ptr + tile)
        count = tl.load(tile_counts_ptr + tile)
        rank, start = ranks_of_unit(
            record_of_ptr, records_ptr, unit, column, num_layers, first_site, num_sites, table_sites
        )
        row = (block - tl.load(starts_ptr + tile)) * block_ranks + tl.arange(0, block_ranks)
        unit_pages_ptr = pages_ptr + load_fact(first_page_ptr + unit)
        begin = 0
        while begin < count:
            entry = begin + tl.arange(0, rows)
            inside = (row < rank)[:, None] & (entry < count)[None, :]
            x_row = tl.load(x_rows_ptr + first + entry, mask=entry < count, other=0).to(tl.int64)
            token = tl.load(tokens_ptr + x_row * x_stride, mask=entry < count, other=0)
            at = chunk_elements(
                unit_pages_ptr,
                start,
                in_chunks,
                row[:, None],
                (token // CHUNK)[None, :],
                inside,
                num_layers,
                layer_chunks,
                page_chunks,
                striped,
            )
            a = tl.load(chunks_ptr + at + (token % CHUNK)[None, :], mask=inside, other=0.0)
            low_at = (first + entry)[None, :] * low_stride + row[:, None]
            tl.store(low_ptr + low_at, a.to(tl.float32), mask=inside)
            begin += rows
        block += tl.num_programs(0)
