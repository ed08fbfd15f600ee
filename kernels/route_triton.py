"""Triton kernels that choose experts and list their work on the device, so that no step waits for the host.

Scores of routers and the choice follow ``ops.route``; its entries are then sorted by unit and cut into tiles, as
``lora_tiles.py`` does on the host, by counting: an entry's place is how many come before it. Every place is one that a
tile may begin at, and a place where none begins has a tile of no entries, which has no blocks.
"""

from __future__ import annotations

from loraplex.kernels.adapter_table import FIELDS as _FIELDS
from loraplex.kernels.adapter_table import ROUTER_FIELDS as _ROUTER_FIELDS
from loraplex.kernels.lora_triton import chunk_elements
from loraplex.kernels.triton_runtime import jit, tl

FIELDS = tl.constexpr(_FIELDS) if tl else _FIELDS
ROUTER_FIELDS = tl.constexpr(_ROUTER_FIELDS) if tl else _ROUTER_FIELDS
NOT_CHOSEN = tl.constexpr(1 << 30) if tl else 1 << 30


@jit
def router_scores_kernel(
    scores_ptr: tl.tensor,
    x_ptr: tl.tensor,
    wide_chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    routers_ptr: tl.tensor,
    x_rows_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    num_entries: tl.tensor,
    x_stride: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    router_site: tl.constexpr,
    router_sites: tl.constexpr,
    in_features: tl.constexpr,
    splits: tl.constexpr,
    split_chunks: tl.constexpr,
    wide_chunk: tl.constexpr,
    page_chunks: tl.constexpr,
    block_rows: tl.constexpr,
    block_experts: tl.constexpr,
) -> None:
    """``scores[split, entry, e] = <w[e], x[entry]>`` in fp32 over a split of the input, for the rows of one tile.

    ``wide_chunk``: float32 elements of a chunk of the arena.
    """
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    lane = tl.arange(0, wide_chunk)
    entry = tl.arange(0, block_rows)
    expert = tl.arange(0, block_experts)
    unit = tl.load(tile_units_ptr + tile)
    first = tl.load(tile_firsts_ptr + tile)
    has_entry = entry < tl.load(tile_counts_ptr + tile)
    record = tl.load(record_of_ptr + unit * (num_layers + 1) + layer)
    router_ptr = routers_ptr + (record * router_sites + router_site) * ROUTER_FIELDS
    has_expert = expert < tl.load(router_ptr)
    start = tl.load(router_ptr + 1)
    x_row = tl.load(x_rows_ptr + first + entry, mask=has_entry, other=0).to(tl.int64)
    unit_pages_ptr = pages_ptr + tl.load(first_page_ptr + unit)
    stride: tl.constexpr = (in_features + wide_chunk - 1) // wide_chunk
    acc = tl.zeros((block_experts, block_rows), tl.float32)
    for step in range(split_chunks):
        chunk = split * split_chunks + step
        here = has_expert & (chunk < stride)
        # Chunks count the same in either width; only their elements do not.
        at = chunk_elements(unit_pages_ptr, start, stride, expert, chunk, here, 1, 0, page_chunks, False)
        at = at // 128 * wide_chunk
        w = tl.load(wide_chunks_ptr + at[:, None] + lane[None, :], mask=here[:, None], other=0.0)
        feature = chunk * wide_chunk + lane
        inside = has_entry[:, None] & (feature < in_features)[None, :]
        x = tl.load(x_ptr + x_row[:, None] * x_stride + feature[None, :], mask=inside, other=0.0)
        acc = tl.dot(w, tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    scores_at = (split * num_entries + first + entry[None, :]) * block_experts + expert[:, None]
    tl.store(scores_ptr + scores_at, acc, mask=has_entry[None, :])


@jit
def choose_kernel(
    experts_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    slot_weights_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    entry_units_ptr: tl.tensor,
    entry_slots_ptr: tl.tensor,
    mix_weights_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    renormalize_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    routers_ptr: tl.tensor,
    num_entries: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    router_site: tl.constexpr,
    router_sites: tl.constexpr,
    splits: tl.constexpr,
    most: tl.constexpr,
    block_experts: tl.constexpr,
) -> None:
    """One row's experts, best first, as in ``ops.route``: ``p = softmax(scores) / temperature``, at most its limit of
    them and none once those before it sum to more than top_p. A slot that is not filled has unit -1 and weight 0.
    """
    entry = tl.program_id(0)
    expert = tl.arange(0, block_experts)
    unit = tl.load(entry_units_ptr + entry)
    record = tl.load(record_of_ptr + unit * (num_layers + 1) + layer)
    known = tl.load(routers_ptr + (record * router_sites + router_site) * ROUTER_FIELDS, mask=record >= 0, other=0)
    score = tl.zeros((block_experts,), tl.float32)
    for split in range(splits):
        score += tl.load(
            scores_ptr + (split * num_entries + entry) * block_experts + expert, mask=expert < known, other=0
        )
    score = tl.where(expert < known, score, float("-inf"))
    raised = tl.where(expert < known, tl.exp(score - tl.max(score, 0)), 0.0)
    p = raised / tl.sum(raised, 0) / tl.load(temperature_ptr + entry)
    limit = tl.load(limits_ptr + entry)
    top_p = tl.load(top_p_ptr + entry)
    left = tl.where(expert < known, p, -1.0)
    before = 0.0
    total = 0.0
    for place in range(most):
        best = tl.max(left, 0)
        index = tl.min(tl.where(left == best, expert, block_experts), 0)
        taken = (place < limit) & (best > 0) & ((place == 0) | (before <= top_p))
        tl.store(experts_ptr + entry * most + place, tl.where(best >= 0, index, 0))
        tl.store(chosen_ptr + entry * most + place, tl.where(taken, best, 0.0))
        total += tl.where(taken, best, 0.0)
        before += tl.where(best > 0, best, 0.0)
        left = tl.where(expert == index, -1.0, left)
        slot = tl.load(entry_slots_ptr + entry) * most + place
        tl.store(slot_units_ptr + slot, tl.where(taken, unit + 1 + index, -1))
        tl.store(slot_weights_ptr + slot, tl.where(taken, best, 0.0))
    divisor = tl.where(tl.load(renormalize_ptr + entry) != 0, total, 1.0)
    mix_weight = tl.load(mix_weights_ptr + entry)
    for place in range(most):
        weight = tl.load(chosen_ptr + entry * most + place) / divisor
        slot = tl.load(entry_slots_ptr + entry) * most + place
        tl.store(chosen_ptr + entry * most + place, weight)
        tl.store(slot_weights_ptr + slot, weight * mix_weight)


@jit
def sort_slots_kernel(
    x_rows_ptr: tl.tensor,
    y_rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    slot_weights_ptr: tl.tensor,
    slot_rows_ptr: tl.tensor,
    num_slots: tl.tensor,
    block_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Place slots in the order of their units, those not chosen last, and begin a tile at every ``block_rows``-th."""
    slot = tl.program_id(0) * block + tl.arange(0, block)
    inside = slot < num_slots
    unit = tl.load(slot_units_ptr + slot, mask=inside, other=-1)
    key = tl.where(unit >= 0, unit, NOT_CHOSEN)
    smaller = tl.zeros((block,), tl.int32)
    equal_before = tl.zeros((block,), tl.int32)
    equal = tl.zeros((block,), tl.int32)
    start = 0
    while start < num_slots:
        other = start + tl.arange(0, block)
        is_slot = other < num_slots
        other_unit = tl.load(slot_units_ptr + other, mask=is_slot, other=-1)
        other_key = tl.where(other_unit >= 0, other_unit, NOT_CHOSEN)
        same = (other_key[None, :] == key[:, None]) & is_slot[None, :]
        smaller += tl.sum(((other_key[None, :] < key[:, None]) & is_slot[None, :]).to(tl.int32), 1)
        equal += tl.sum(same.to(tl.int32), 1)
        equal_before += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        start += block
    place = smaller + equal_before
    row = tl.load(slot_rows_ptr + slot, mask=inside, other=0)
    tl.store(x_rows_ptr + place, row, mask=inside)
    tl.store(y_rows_ptr + place, row, mask=inside)
    tl.store(slots_ptr + place, slot, mask=inside)
    tl.store(weights_ptr + place, tl.load(slot_weights_ptr + slot, mask=inside, other=0.0), mask=inside)
    begins = (unit >= 0) & (equal_before % block_rows == 0)
    count = tl.where(begins, tl.minimum(equal - equal_before, block_rows), 0)
    tl.store(tile_units_ptr + place, tl.maximum(unit, 0), mask=inside)
    tl.store(tile_firsts_ptr + place, place, mask=inside)
    tl.store(tile_counts_ptr + place, count, mask=inside)


@jit
def count_blocks_kernel(
    shrink_starts_ptr: tl.tensor,
    expand_starts_ptr: tl.tensor,
    low_starts_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    records_ptr: tl.tensor,
    num_slots: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    first_site: tl.constexpr,
    num_sites: tl.constexpr,
    table_sites: tl.constexpr,
    columns_0: tl.constexpr,
    columns_1: tl.constexpr,
    columns_2: tl.constexpr,
    parts: tl.constexpr,
    block_ranks: tl.constexpr,
    tiles: tl.constexpr,
) -> None:
    """The blocks of each tile at a group of sites, summed up as ``lora_tiles.Work`` has them; one program."""
    tile = tl.arange(0, tiles)
    inside = tile < num_slots
    count = tl.load(tile_counts_ptr + tile, mask=inside, other=0)
    unit = tl.load(tile_units_ptr + tile, mask=inside, other=0)
    record = tl.load(record_of_ptr + unit * (num_layers + 1) + layer, mask=count > 0, other=-1)
    rank = tl.zeros((tiles,), tl.int32)
    expand = tl.zeros((tiles,), tl.int32)
    for site in tl.static_range(num_sites):
        columns = columns_0 if site == 0 else (columns_1 if site == 1 else columns_2)
        at = (record * table_sites + first_site + site) * FIELDS
        more = tl.load(records_ptr + at, mask=record >= 0, other=0)
        rank += more
        expand += tl.where(more > 0, columns, 0)
    shrink = (rank + block_ranks - 1) // block_ranks * parts
    low = rank * count
    tl.store(shrink_starts_ptr + 1 + tile, tl.cumsum(shrink, 0))
    tl.store(expand_starts_ptr + 1 + tile, tl.cumsum(expand, 0))
    tl.store(low_starts_ptr + tile, tl.cumsum(low, 0) - low)
    first = tile == 0
    tl.store(shrink_starts_ptr + tile, tl.zeros((tiles,), tl.int32), mask=first)
    tl.store(expand_starts_ptr + tile, tl.zeros((tiles,), tl.int32), mask=first)
