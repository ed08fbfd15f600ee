"""Triton kernels of mixtures of feed-forward networks: inner activations of the chosen experts, and their sums by row.

Slots, places and tiles are those of ``route_triton.py``. The experts' gate and up never lie in memory: a block adds
their low-rank products to the base's in fp32, and stores what the activation makes of them.
"""

from __future__ import annotations

from loraplex.kernels.adapter_table import FIELDS as _FIELDS
from loraplex.kernels.lora_rows import CHUNK as _CHUNK
from loraplex.kernels.lora_triton import chunk_elements
from loraplex.kernels.route_triton import routed_jit
from loraplex.kernels.routed_lists import ACTIVATION_CODES
from loraplex.kernels.triton_runtime import jit, load_fact, tl

FIELDS = tl.constexpr(_FIELDS) if tl else _FIELDS
CHUNK = tl.constexpr(_CHUNK) if tl else _CHUNK
SILU = tl.constexpr(ACTIVATION_CODES["silu"]) if tl else ACTIVATION_CODES["silu"]
GELU = tl.constexpr(ACTIVATION_CODES["gelu"]) if tl else ACTIVATION_CODES["gelu"]
GELU_TANH = tl.constexpr(ACTIVATION_CODES["gelu_pytorch_tanh"]) if tl else ACTIVATION_CODES["gelu_pytorch_tanh"]


@jit
def site_product(
    low_ptr: tl.tensor,
    low_at: tl.tensor,
    low_size: tl.tensor,
    base_ptrs: tl.tensor,
    bias_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    unit_pages_ptr: tl.tensor,
    site_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    known: tl.tensor,
    chunk: tl.tensor,
    has_entry: tl.tensor,
    width: tl.constexpr,
    parts: tl.constexpr,
    page_chunks: tl.constexpr,
    block_rows: tl.constexpr,
    block_ranks: tl.constexpr,
    biased: tl.constexpr,
    gains: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:
    """``base + scale * B^T low + (g - 1) * (base - bias)`` in fp32, [CHUNK, block_rows], for a chunk of one site's
    columns; the base alone where the unit lacks the site.

    ``low_at``: [block_rows], where the site's first rank row of each entry lies. ``bias_ptr``: of the chunk.
    """
    lane = tl.arange(0, CHUNK)
    rank = tl.load(site_ptr, mask=known, other=0)
    start = tl.load(site_ptr + 2, mask=known, other=0)
    stride: tl.constexpr = (width + CHUNK - 1) // CHUNK
    acc = tl.zeros((CHUNK, block_rows), tl.float32)
    first_rank = 0
    while first_rank < rank:
        row = first_rank + tl.arange(0, block_ranks)
        has_row = row < rank
        at = chunk_elements(unit_pages_ptr, start, stride, row, chunk, has_row, 1, 0, page_chunks, False)
        b = tl.load(chunks_ptr + at[:, None] + lane[None, :], mask=has_row[:, None], other=0.0)
        low = tl.zeros((block_ranks, block_rows), tl.float32)
        for part in range(parts):
            low_ptrs = low_ptr + part * low_size + low_at[None, :] + row[:, None]
            low += tl.load(low_ptrs, mask=has_row[:, None] & has_entry[None, :], other=0.0)
        if wide:
            low = low.to(b.dtype).to(tl.float32)
            acc = tl.dot(tl.trans(b.to(tl.float32)), low, acc, input_precision="ieee")
        else:
            acc = tl.dot(tl.trans(b), low.to(b.dtype), acc, input_precision="ieee")
        first_rank += block_ranks
    inside = (chunk * CHUNK + lane < width)[:, None] & has_entry[None, :]
    base = tl.load(base_ptrs, mask=inside, other=0.0).to(tl.float32)
    product = base + acc * tl.load(scale_ptr, mask=known, other=0.0)
    if gains:
        # No gains begin at 0, where an image's first row of A lies; an absent site has 0 there.
        gain_start = tl.load(site_ptr + 3, mask=known, other=0)
        has_gain = gain_start > 0
        at = chunk_elements(unit_pages_ptr, gain_start, stride, chunk * 0, chunk, has_gain, 1, 0, page_chunks, False)
        gain = tl.load(chunks_ptr + at + lane, mask=lane < has_gain.to(tl.int32) * CHUNK, other=0.0).to(tl.float32)
        pure = base
        if biased:
            bias = tl.load(bias_ptr + lane, mask=chunk * CHUNK + lane < width, other=0.0).to(tl.float32)
            pure = base - bias[:, None]
        product += gain[:, None] * pure
    return product


@routed_jit
def expert_hidden_kernel(
    hidden_ptr: tl.tensor,
    base_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    low_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    activations_ptr: tl.tensor,
    sorted_rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    low_size: tl.tensor,
    low_stride: tl.tensor,
    base_stride: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    first_site: tl.constexpr,
    table_sites: tl.constexpr,
    width: tl.constexpr,
    most: tl.constexpr,
    parts: tl.constexpr,
    page_chunks: tl.constexpr,
    tile_rows: tl.constexpr,
    block_rows: tl.constexpr,
    block_ranks: tl.constexpr,
    base_activation: tl.constexpr,
    biased: tl.constexpr,
    gains: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``hidden[slot] = act(gate) * up`` for a chunk of the columns of a tile's slots, ``block_rows`` of them at a time.

    Gate and up are the base's products in the row of each slot plus the expert's; an expert that has neither leaves
    the base's.
    """
    lane = tl.arange(0, CHUNK)
    column_blocks: tl.constexpr = (width + CHUNK - 1) // CHUNK
    tile_blocks: tl.constexpr = tile_rows // block_rows
    total = tl.load(num_tiles_ptr) * column_blocks * tile_blocks
    block = tl.program_id(0)
    while block < total:
        tile = block // (column_blocks * tile_blocks)
        chunk = block // tile_blocks % column_blocks
        entry = block % tile_blocks * block_rows + tl.arange(0, block_rows)
        count = tl.load(tile_counts_ptr + tile)
        if block % tile_blocks * block_rows < count:
            unit = load_fact(tile_units_ptr + tile)
            first = tl.load(tile_firsts_ptr + tile)
            has_entry = entry < count
            record = load_fact(record_of_ptr + unit * (num_layers + 1) + layer)
            known = record >= 0
            site = tl.maximum(record, 0) * table_sites + first_site
            gate_ptr = records_ptr + site * FIELDS
            unit_pages_ptr = pages_ptr + load_fact(first_page_ptr + unit)
            slot = tl.load(slots_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
            row = tl.load(sorted_rows_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
            code = tl.load(activations_ptr + tl.load(slots_ptr + first) // most)
            feature = chunk * CHUNK + lane
            low_at = (first + entry).to(tl.int64) * low_stride
            base_ptrs = base_ptr + row[None, :] * base_stride + feature[:, None]
            gate = site_product(
                low_ptr,
                low_at,
                low_size,
                base_ptrs,
                bias_ptr + chunk * CHUNK,
                chunks_ptr,
                unit_pages_ptr,
                gate_ptr,
                scales_ptr + site,
                known,
                chunk,
                has_entry,
                width,
                parts,
                page_chunks,
                block_rows,
                block_ranks,
                biased,
                gains,
                wide,
            )
            code = tl.where(code == 0, base_activation, code)
            if code == SILU:
                gate = gate * tl.sigmoid(gate)
            elif code == GELU:
                gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
            elif code == GELU_TANH:
                gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
            else:
                gate = tl.maximum(gate, 0.0)
            up = site_product(
                low_ptr,
                low_at + tl.load(gate_ptr, mask=known, other=0),
                low_size,
                base_ptrs + width,
                bias_ptr + width + chunk * CHUNK,
                chunks_ptr,
                unit_pages_ptr,
                gate_ptr + FIELDS,
                scales_ptr + site + 1,
                known,
                chunk,
                has_entry,
                width,
                parts,
                page_chunks,
                block_rows,
                block_ranks,
                biased,
                gains,
                wide,
            )
            hidden_ptrs = hidden_ptr + slot[None, :] * width + feature[:, None]
            inside = (feature < width)[:, None] & has_entry[None, :]
            tl.store(hidden_ptrs, (gate * up).to(hidden_ptr.dtype.element_ty), mask=inside)
        block += tl.num_programs(0)


@routed_jit
def combine_kernel(
    to_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    slot_weights_ptr: tl.tensor,
    sum_rows_ptr: tl.tensor,
    slot_starts_ptr: tl.tensor,
    to_stride: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``to[row] = sum over the row's filled slots of weight * hidden[slot]``, in the order of the slots, in fp32, for a
    block of columns. A row without a filled slot keeps what it has.
    """
    place = tl.program_id(0)
    row = tl.load(sum_rows_ptr + place).to(tl.int64)
    if row >= 0:
        feature = tl.program_id(1) * block + tl.arange(0, block)
        inside = feature < width
        acc = tl.zeros((block,), tl.float32)
        filled = 0
        slot = tl.load(slot_starts_ptr + place)
        stop = tl.load(slot_starts_ptr + place + 1)
        while slot < stop:
            chosen = tl.load(slot_units_ptr + slot) >= 0
            weight = tl.load(slot_weights_ptr + slot)
            hidden_ptrs = hidden_ptr + slot.to(tl.int64) * width + feature
            acc += weight * tl.load(hidden_ptrs, mask=inside & chosen, other=0.0).to(tl.float32)
            filled += chosen.to(tl.int32)
            slot += 1
        to_ptrs = to_ptr + row * to_stride + feature
        tl.store(to_ptrs, acc.to(to_ptr.dtype.element_ty), mask=inside & (filled > 0))


@routed_jit
def share_bias_kernel(
    y_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    sum_rows_ptr: tl.tensor,
    slot_starts_ptr: tl.tensor,
    y_stride: tl.tensor,
    width: tl.constexpr,
    most: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``y[row] += (sum of its weights - 1) * bias`` for each adapter whose router chose for the row."""
    place = tl.program_id(0)
    row = tl.load(sum_rows_ptr + place).to(tl.int64)
    if row >= 0:
        feature = tl.program_id(1) * block + tl.arange(0, block)
        inside = feature < width
        share = 0.0
        slot = tl.load(slot_starts_ptr + place)
        stop = tl.load(slot_starts_ptr + place + 1)
        while slot < stop:
            total = 0.0
            for one in range(most):
                total += tl.load(chosen_ptr + slot + one)
            share += tl.where(total > 0, total - 1.0, 0.0)
            slot += most
        y_ptrs = y_ptr + row * y_stride + feature
        y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
        y += share * tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
