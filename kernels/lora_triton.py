"""Triton kernels of the low-rank work: shrink to ``x A^T``, expand by ``B^T``, and sums of a row's entries.

Both products are computed transposed, with rank rows or output columns as the rows of the matrix instruction and a
tile's entries as its columns. So a row's result does not depend on how many entries stand beside it: neither the order
of its sum nor the kind of instruction changes. Sums go over chunks in ascending order within a split and over splits in
ascending order, in fp32; there are no atomics. Loops whose bounds are not constants are ``while`` loops, as Triton's
interpreter takes no tensors in ``range``. Tiles and blocks are those of ``lora_tiles.py``, records those of
``adapter_table.py``.
"""

from __future__ import annotations

from loraplex.kernels.adapter_table import FIELDS as _FIELDS
from loraplex.kernels.lora_rows import CHUNK as _CHUNK
from loraplex.kernels.triton_runtime import jit, tl

FIELDS = tl.constexpr(_FIELDS) if tl else _FIELDS
CHUNK = tl.constexpr(_CHUNK) if tl else _CHUNK


@jit
def tile_of_block(starts_ptr: tl.tensor, block: tl.tensor, tiles: tl.constexpr) -> tl.tensor:
    """The tile whose blocks include ``block``: how many tiles end at or before it."""
    ends = tl.load(starts_ptr + 1 + tl.arange(0, tiles))
    return tl.sum((ends <= block).to(tl.int32), 0)


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
    page = tl.load(pages_ptr + at // page_chunks, mask=valid, other=0).to(tl.int64)
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
def site_of_block(
    sites_ptr: tl.tensor,
    block: tl.tensor,
    num_sites: tl.constexpr,
    out_0: tl.constexpr,
    out_1: tl.constexpr,
    out_2: tl.constexpr,
) -> tl.tensor:
    """Which of a group's present sites, and which chunk of its columns, a block belongs to.

    Returns:
        Index of the site, chunk, width of the site, columns before it, its rank, ranks before it, ranks of all sites.
    """
    mine = 0
    chunk = 0
    width = 0
    left = 0
    rank = 0
    rank_before = 0
    blocks_before = 0
    all_ranks = 0
    columns_before = 0
    for site in tl.static_range(num_sites):
        out = out_0 if site == 0 else (out_1 if site == 1 else out_2)
        more = tl.load(sites_ptr + site * FIELDS)
        blocks = tl.where(more > 0, (out + CHUNK - 1) // CHUNK, 0)
        here = (block >= blocks_before) & (block < blocks_before + blocks)
        mine = tl.where(here, site, mine)
        chunk = tl.where(here, block - blocks_before, chunk)
        width = tl.where(here, out, width)
        left = tl.where(here, columns_before, left)
        rank = tl.where(here, more, rank)
        rank_before = tl.where(here, all_ranks, rank_before)
        blocks_before += blocks
        all_ranks += more
        columns_before += out
    return mine, chunk, width, left, rank, rank_before, all_ranks


@jit
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
    low_starts_ptr: tl.tensor,
    low_size: tl.tensor,
    x_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    in_features: tl.constexpr,
    parts: tl.constexpr,
    splits: tl.constexpr,
    split_chunks: tl.constexpr,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    tiles: tl.constexpr,
    block_rows: tl.constexpr,
    block_ranks: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``low[part, entry, r] = sum over the part's chunks of <A[r], x[entry]>`` for a block of rank rows of a tile."""
    lane = tl.arange(0, CHUNK)
    entry = tl.arange(0, block_rows)
    total = tl.load(starts_ptr + tiles)
    block = tl.program_id(0)
    while block < total:
        tile = tile_of_block(starts_ptr, block, tiles)
        inner = block - tl.load(starts_ptr + tile)
        unit = tl.load(tile_units_ptr + tile)
        count = tl.load(tile_counts_ptr + tile)
        record = tl.load(record_of_ptr + unit * (num_layers + 1) + column)
        sites_ptr = records_ptr + (record * table_sites + first_site) * FIELDS
        rank = 0
        start = 0
        for site in tl.static_range(num_sites):
            more = tl.load(sites_ptr + site * FIELDS)
            start = tl.where((rank == 0) & (more > 0), tl.load(sites_ptr + site * FIELDS + 1), start)
            rank += more
        row = (inner // parts) * block_ranks + tl.arange(0, block_ranks)
        part = inner % parts
        has_row = row < rank
        has_entry = entry < count
        x_row = tl.load(x_rows_ptr + tl.load(tile_firsts_ptr + tile) + entry, mask=has_entry, other=0).to(tl.int64)
        unit_pages_ptr = pages_ptr + tl.load(first_page_ptr + unit)
        in_chunks: tl.constexpr = (in_features + CHUNK - 1) // CHUNK
        summed = tl.zeros((block_ranks, block_rows), tl.float32)
        for split in range(splits // parts):
            acc = tl.zeros((block_ranks, block_rows), tl.float32)
            for step in range(split_chunks):
                chunk = (part + split) * split_chunks + step
                has_chunk = has_row & (chunk < in_chunks)
                at = chunk_elements(
                    unit_pages_ptr,
                    start,
                    in_chunks,
                    row,
                    chunk,
                    has_chunk,
                    num_layers,
                    layer_chunks,
                    page_chunks,
                    striped,
                )
                a = tl.load(chunks_ptr + at[:, None] + lane[None, :], mask=has_chunk[:, None], other=0.0)
                feature = chunk * CHUNK + lane
                inside = has_entry[:, None] & (feature < in_features)[None, :]
                x = tl.load(x_ptr + x_row[:, None] * x_stride + feature[None, :], mask=inside, other=0.0)
                acc = multiply(a, tl.trans(x), acc, wide)
            summed += acc
        low_at = part * low_size + tl.load(low_starts_ptr + tile) + entry[None, :] * rank + row[:, None]
        tl.store(low_ptr + low_at, summed, mask=has_row[:, None] & has_entry[None, :])
        block += tl.num_programs(0)


@jit
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
    low_starts_ptr: tl.tensor,
    low_size: tl.tensor,
    to_stride: tl.tensor,
    base_stride: tl.tensor,
    column: tl.tensor,
    num_layers: tl.tensor,
    layer_chunks: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    out_0: tl.constexpr,
    out_1: tl.constexpr,
    out_2: tl.constexpr,
    parts: tl.constexpr,
    page_chunks: tl.constexpr,
    striped: tl.constexpr,
    tiles: tl.constexpr,
    block_rows: tl.constexpr,
    block_ranks: tl.constexpr,
    as_deltas: tl.constexpr,
    base_by_entry: tl.constexpr,
    biased: tl.constexpr,
    gains: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``weight * (scale * B^T low + (g - 1) * (base - bias))`` for a chunk of output columns of a tile's entries.

    ``as_deltas``: stored in each entry's slot of ``to`` in fp32, else added to its row of ``to``. ``base_by_entry``:
    the base product has a row per entry, else those of the output.
    """
    entry = tl.arange(0, block_rows)
    lane = tl.arange(0, CHUNK)
    total = tl.load(starts_ptr + tiles)
    block = tl.program_id(0)
    while block < total:
        tile = tile_of_block(starts_ptr, block, tiles)
        inner = block - tl.load(starts_ptr + tile)
        unit = tl.load(tile_units_ptr + tile)
        first = tl.load(tile_firsts_ptr + tile)
        record = tl.load(record_of_ptr + unit * (num_layers + 1) + column)
        sites_ptr = records_ptr + (record * table_sites + first_site) * FIELDS
        mine, chunk, width, left, rank, rank_before, all_ranks = site_of_block(
            sites_ptr, inner, num_sites, out_0, out_1, out_2
        )
        site_ptr = sites_ptr + mine * FIELDS
        start = tl.load(site_ptr + 2)
        scale = tl.load(scales_ptr + record * table_sites + first_site + mine)
        stride = (width + CHUNK - 1) // CHUNK
        has_entry = entry < tl.load(tile_counts_ptr + tile)
        unit_pages_ptr = pages_ptr + tl.load(first_page_ptr + unit)
        weight = tl.load(weights_ptr + first + entry, mask=has_entry, other=0.0)
        feature = chunk * CHUNK + lane
        low_at = tl.load(low_starts_ptr + tile) + rank_before
        acc = tl.zeros((CHUNK, block_rows), tl.float32)
        row_start = 0
        while row_start < rank:
            row = row_start + tl.arange(0, block_ranks)
            has_row = row < rank
            at = chunk_elements(
                unit_pages_ptr, start, stride, row, chunk, has_row, num_layers, layer_chunks, page_chunks, striped
            )
            b = tl.load(chunks_ptr + at[:, None] + lane[None, :], mask=has_row[:, None], other=0.0)
            inside = has_row[:, None] & has_entry[None, :]
            low = tl.zeros((block_ranks, block_rows), tl.float32)
            for part in range(parts):
                low_ptrs = low_ptr + part * low_size + low_at + entry[None, :] * all_ranks + row[:, None]
                low += tl.load(low_ptrs, mask=inside, other=0.0)
            acc = multiply(tl.trans(b), low.to(b.dtype), acc, wide)
            row_start += block_ranks
        delta = acc * (weight * scale)[None, :]
        y_row = tl.load(y_rows_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
        inside = (feature < width)[:, None] & has_entry[None, :]
        if gains:
            gain_start = tl.load(site_ptr + 3)
            has_gain = gain_start >= 0
            none = chunk * 0
            at = chunk_elements(
                unit_pages_ptr,
                gain_start,
                stride,
                none,
                chunk,
                has_gain,
                num_layers,
                layer_chunks,
                page_chunks,
                striped,
            )
            gain = tl.load(chunks_ptr + at + lane, mask=lane < has_gain * CHUNK, other=0.0).to(tl.float32)
            base_row = y_row
            if base_by_entry:
                base_row = (first + entry).to(tl.int64)
            base_ptrs = base_ptr + base_row[None, :] * base_stride + (left + feature)[:, None]
            base = tl.load(base_ptrs, mask=inside & has_gain, other=0.0).to(tl.float32)
            if biased:
                base -= tl.load(bias_ptr + left + feature, mask=feature < width, other=0.0).to(tl.float32)[:, None]
            delta = tl.where(has_gain, delta + gain[:, None] * base * weight[None, :], delta)
        if as_deltas:
            slot = tl.load(slots_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
            tl.store(to_ptr + slot[None, :] * to_stride + (left + feature)[:, None], delta, mask=inside)
        else:
            to_ptrs = to_ptr + y_row[None, :] * to_stride + (left + feature)[:, None]
            y = tl.load(to_ptrs, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_ptrs, (y + delta).to(to_ptr.dtype.element_ty), mask=inside)
        block += tl.num_programs(0)


@jit
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

    A slot whose unit lacks the site was not written and is left out.
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
        y_ptrs = y_ptr + row * y_stride + left + feature
        y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=inside)
        job += tl.num_programs(0)
