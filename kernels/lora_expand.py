"""Triton kernels of the second half of the low-rank work: expand by ``B^T``, and sums of a row's entries.

They go by the rules that ``lora_triton.py`` states.
"""

from __future__ import annotations

from loraplex.kernels.lora_triton import (
    CHUNK,
    FIELDS,
    chunk_elements,
    first_ends,
    launch_jit,
    load_rows,
    multiply,
    tile_of_block,
)
from loraplex.kernels.triton_runtime import jit, load_fact, tl


@jit
def site_of_block(
    sites_ptr: tl.tensor,
    block: tl.tensor,
    num_sites: tl.constexpr,
    out_0: tl.constexpr,
    out_1: tl.constexpr,
    out_2: tl.constexpr,
    block_columns: tl.constexpr,
) -> tl.tensor:
    """Which of a group's present sites, and which block of its columns, a block belongs to.

    Returns:
        Index of the site, block of columns, width of the site, columns before it, its rank, ranks before it, and where
        its B begins.
    """
    mine = 0
    place = 0
    width = 0
    left = 0
    rank = 0
    rank_before = 0
    start = 0
    blocks_before = 0
    all_ranks = 0
    columns_before = 0
    for site in tl.static_range(num_sites):
        out = out_0 if site == 0 else (out_1 if site == 1 else out_2)
        more = load_fact(sites_ptr + site * FIELDS)
        its_start = load_fact(sites_ptr + site * FIELDS + 2)
        blocks = tl.where(more > 0, (out + block_columns - 1) // block_columns, 0)
        here = (block >= blocks_before) & (block < blocks_before + blocks)
        mine = tl.where(here, site, mine)
        place = tl.where(here, block - blocks_before, place)
        width = tl.where(here, out, width)
        left = tl.where(here, columns_before, left)
        rank = tl.where(here, more, rank)
        rank_before = tl.where(here, all_ranks, rank_before)
        start = tl.where(here, its_start, start)
        blocks_before += blocks
        all_ranks += more
        columns_before += out
    return mine, place, width, left, rank, rank_before, start


@jit
def sum_parts(
    low_ptrs: tl.tensor, low_part: tl.tensor, inside: tl.tensor, parts: tl.constexpr, together: tl.constexpr
) -> tl.tensor:
    """The partial sums of shrink in ascending order, a few of them under way at a time."""
    low = tl.load(low_ptrs, mask=inside, other=0.0)
    for group in range((parts - 1) // together):
        for place in tl.static_range(together):
            low += tl.load(low_ptrs + (1 + group * together + place) * low_part, mask=inside, other=0.0)
    for place in tl.static_range((parts - 1) % together):
        low += tl.load(low_ptrs + (parts - (parts - 1) % together + place) * low_part, mask=inside, other=0.0)
    return low


@launch_jit
def sum_partial_kernel(
    summed_ptr: tl.tensor, low_ptr: tl.tensor, low_part: tl.tensor, parts: tl.constexpr, block: tl.constexpr
) -> None:
    """``summed[i] = sum over parts of low[part, i]``; what lies in no rank row is summed too, and read by nobody."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < low_part
    tl.store(summed_ptr + place, sum_parts(low_ptr + place, low_part, inside, parts, 4), mask=inside)


@launch_jit
def expand_kernel(
    to_ptr: tl.tensor,
    base_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    low_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    y_rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    starts_at: tl.tensor,
    low_part: tl.tensor,
    low_stride: tl.tensor,
    to_stride: tl.tensor,
    base_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    tiles: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    out_0: tl.constexpr,
    out_1: tl.constexpr,
    out_2: tl.constexpr,
    parts: tl.constexpr,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    rows: tl.constexpr,
    block_ranks: tl.constexpr,
    block_columns: tl.constexpr,
    as_deltas: tl.constexpr,
    base_by_slot: tl.constexpr,
    biased: tl.constexpr,
    gains: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``weight * (scale * B^T low + (g - 1) * (base - bias))`` for a block of output columns of a tile's entries.

    ``as_deltas``: stored in each entry's slot of ``to`` in fp32, else added to its row of ``to``. ``base_by_slot``:
    the base product has a row per slot, else those of the output.
    """
    starts_ptr += starts_at
    lane = tl.arange(0, block_columns)
    near = first_ends(starts_ptr, tiles)
    total = load_fact(starts_ptr + tiles)
    block = tl.program_id(0)
    while block < total:
        tile = tile_of_block(starts_ptr, near, block, tiles)
        inner = block - load_fact(starts_ptr + tile)
        unit = load_fact(tile_units_ptr + tile)
        first = load_fact(tile_firsts_ptr + tile)
        count = load_fact(tile_counts_ptr + tile)
        record = load_fact(record_of_ptr + unit * (num_layers + 1) + column)
        sites_ptr = records_ptr + (record * table_sites + first_site) * FIELDS
        mine, place, width, left, rank, rank_before, start = site_of_block(
            sites_ptr, inner, num_sites, out_0, out_1, out_2, block_columns
        )
        site_ptr = sites_ptr + mine * FIELDS
        scale = load_fact(scales_ptr + record * table_sites + first_site + mine)
        stride = (width + CHUNK - 1) // CHUNK
        unit_pages_ptr = pages_ptr + load_fact(first_page_ptr + unit)
        feature = place * block_columns + lane
        chunk = feature // CHUNK
        begin = 0
        while begin < count:
            entry = begin + tl.arange(0, rows)
            has_entry = entry < count
            weight = tl.load(weights_ptr + first + entry, mask=has_entry, other=0.0)
            y_row = tl.load(y_rows_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
            acc = tl.zeros((block_columns, rows), tl.float32)
            row_start = 0
            while row_start < rank:
                row = row_start + tl.arange(0, block_ranks)
                has_row = row < rank
                # What is near comes first, as B is waited for.
                inside = has_row[:, None] & has_entry[None, :]
                low_ptrs = low_ptr + (first + entry)[None, :] * low_stride + (rank_before + row)[:, None]
                low = sum_parts(low_ptrs, low_part, inside, parts, 7)
                b = load_rows(
                    chunks_ptr,
                    unit_pages_ptr,
                    start,
                    stride,
                    row,
                    has_row,
                    place * (block_columns // CHUNK),
                    num_layers,
                    layer_chunks,
                    page_chunks,
                    striped,
                    block_ranks,
                    block_columns // CHUNK,
                )
                acc = multiply(tl.trans(b), low.to(b.dtype), acc, wide)
                row_start += block_ranks
            delta = acc * (weight * scale)[None, :]
            inside = (feature < width)[:, None] & has_entry[None, :]
            if gains:
                gain_start = tl.load(site_ptr + 3)
                has_gain = (gain_start >= 0) & (feature < width)
                at = chunk_elements(
                    unit_pages_ptr,
                    gain_start,
                    stride,
                    chunk * 0,
                    chunk,
                    has_gain,
                    num_layers,
                    layer_chunks,
                    page_chunks,
                    striped,
                )
                gain = tl.load(chunks_ptr + at + feature % CHUNK, mask=has_gain, other=0.0).to(tl.float32)
                base_row = y_row
                if base_by_slot:
                    base_row = tl.load(slots_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
                base_ptrs = base_ptr + base_row[None, :] * base_stride + (left + feature)[:, None]
                base = tl.load(base_ptrs, mask=inside & has_gain[:, None], other=0.0).to(tl.float32)
                if biased:
                    base -= tl.load(bias_ptr + left + feature, mask=feature < width, other=0.0).to(tl.float32)[:, None]
                delta = tl.where(has_gain[:, None], delta + gain[:, None] * base * weight[None, :], delta)
            if as_deltas:
                slot = tl.load(slots_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
                tl.store(to_ptr + slot[None, :] * to_stride + (left + feature)[:, None], delta, mask=inside)
            else:
                to_ptrs = to_ptr + y_row[None, :] * to_stride + (left + feature)[:, None]
                y = tl.load(to_ptrs, mask=inside, other=0.0).to(tl.float32)
                tl.store(to_ptrs, (y + delta).to(to_ptr.dtype.element_ty), mask=inside)
            begin += rows
        block += tl.num_programs(0)


@launch_jit
def row_sum_kernel(
    y_ptr: tl.tensor,
    deltas_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    row_starts_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    num_rows: tl.tensor,
    y_stride: tl.tensor,
    deltas_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    first_site: tl.constexpr,
    table_sites: tl.constexpr,
    out_0: tl.constexpr,
    out_1: tl.constexpr,
    out_2: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """``y[row] += the sum of the row's deltas`` in the order of their slots, for a block of columns of one site.

    A slot whose unit lacks the site was not written and is left out, and so is a row of -1.
    """
    blocks_0: tl.constexpr = (out_0 + block_columns - 1) // block_columns
    blocks_1: tl.constexpr = (out_1 + block_columns - 1) // block_columns
    blocks_2: tl.constexpr = (out_2 + block_columns - 1) // block_columns
    blocks: tl.constexpr = blocks_0 + blocks_1 + blocks_2
    job = tl.program_id(0)
    while job < num_rows * blocks:
        place = job // blocks
        inner = job % blocks
        in_1 = inner >= blocks_0
        in_2 = inner >= blocks_0 + blocks_1
        site = in_1.to(tl.int32) + in_2.to(tl.int32)
        width = tl.where(in_2, out_2, tl.where(in_1, out_1, out_0))
        left = tl.where(in_2, out_0 + out_1, tl.where(in_1, out_0, 0))
        before = tl.where(in_2, blocks_0 + blocks_1, tl.where(in_1, blocks_0, 0))
        feature = (inner - before) * block_columns + tl.arange(0, block_columns)
        inside = feature < width
        acc = tl.zeros((block_columns,), tl.float32)
        slot = tl.load(row_starts_ptr + place)
        stop = tl.load(row_starts_ptr + place + 1)
        while slot < stop:
            unit = tl.load(slot_units_ptr + slot)
            record = tl.load(record_of_ptr + unit * (num_layers + 1) + column, mask=unit >= 0, other=-1)
            at = (record * table_sites + first_site + site) * FIELDS
            rank = tl.load(records_ptr + at, mask=record >= 0, other=0)
            delta_ptrs = deltas_ptr + slot.to(tl.int64) * deltas_stride + left + feature
            acc += tl.load(delta_ptrs, mask=inside & (rank > 0), other=0.0)
            slot += 1
        row = tl.load(rows_ptr + place).to(tl.int64)
        here = inside & (row >= 0)
        y_ptrs = y_ptr + row * y_stride + left + feature
        y = tl.load(y_ptrs, mask=here, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=here)
        job += tl.num_programs(0)
