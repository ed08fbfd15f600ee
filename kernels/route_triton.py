"""Triton kernels that choose experts and list their work on the device, so that no step waits for the host.

Scores of routers and the choice follow ``ops.route``. Each routed row has as many *slots* as experts may be chosen for
it; the slots that were filled are then sorted by unit and cut into tiles, as ``lora_tiles.py`` does on the host, by
counting: a slot's place is how many come before it. All routers that read one input share each launch; they are the
second dimension of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplex.kernels.adapter_table import ROUTER_FIELDS as _ROUTER_FIELDS
from loraplex.kernels.lora_triton import chunk_elements
from loraplex.kernels.triton_runtime import load_fact, step_jit, tl

ROUTER_FIELDS = tl.constexpr(_ROUTER_FIELDS) if tl else _ROUTER_FIELDS
NOT_CHOSEN = tl.constexpr(1 << 30) if tl else 1 << 30


VARYING = ("layer", "first_router", "num_entries", "num_slots", "tiles")
"""Integers that differ from layer to layer or from step to step."""

STEP_ARRAYS = (
    "activations_ptr",
    "chosen_ptr",
    "experts_ptr",
    "limits_ptr",
    "mix_weights_ptr",
    "num_tiles_ptr",
    "place_counts_ptr",
    "place_units_ptr",
    "renormalize_ptr",
    "rows_ptr",
    "score_places_ptr",
    "slot_starts_ptr",
    "slot_units_ptr",
    "slot_weights_ptr",
    "slots_ptr",
    "sorted_rows_ptr",
    "sum_rows_ptr",
    "temperature_ptr",
    "tile_counts_ptr",
    "tile_firsts_ptr",
    "tile_units_ptr",
    "top_p_ptr",
    "units_ptr",
    "weights_ptr",
)
"""Arrays of a step, which may begin anywhere in a buffer."""


def routed_jit(kernel: Callable[..., Any]) -> Any:
    """``jit``, with one compilation for all layers, routers, capacities and places in buffers."""
    return step_jit(numbers=VARYING, arrays=STEP_ARRAYS)(kernel)


@routed_jit
def router_scores_kernel(
    scores_ptr: tl.tensor,
    x_ptr: tl.tensor,
    wide_chunks_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    record_of_ptr: tl.tensor,
    routers_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    score_places_ptr: tl.tensor,
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    num_entries: tl.tensor,
    x_stride: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    first_router: tl.tensor,
    router_sites: tl.constexpr,
    in_features: tl.constexpr,
    splits: tl.constexpr,
    split_chunks: tl.constexpr,
    wide_chunk: tl.constexpr,
    page_chunks: tl.constexpr,
    block_rows: tl.constexpr,
    block_experts: tl.constexpr,
    max_experts: tl.constexpr,
) -> None:
    """``scores[router, split, entry, e] = <w[e], x[entry]>`` in fp32 over a split of the input, for one tile's rows and
    a block of experts.

    ``wide_chunk``: float32 elements of a chunk of the arena.
    """
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    router = tl.program_id(1)
    count = load_fact(tile_counts_ptr + tile)
    if count > 0:
        lane = tl.arange(0, wide_chunk)
        entry = tl.arange(0, block_rows)
        expert = tl.program_id(2) * block_experts + tl.arange(0, block_experts)
        unit = load_fact(tile_units_ptr + tile)
        has_entry = entry < count
        record = load_fact(record_of_ptr + unit * (num_layers + 1) + layer)
        router_ptr = routers_ptr + (record * router_sites + first_router + router) * ROUTER_FIELDS
        has_expert = expert < load_fact(router_ptr)
        start = load_fact(router_ptr + 1)
        place = tl.load(score_places_ptr + tl.load(tile_firsts_ptr + tile) + entry, mask=has_entry, other=0)
        x_row = tl.load(rows_ptr + place, mask=has_entry, other=0).to(tl.int64)
        unit_pages_ptr = pages_ptr + load_fact(first_page_ptr + unit)
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
        scores_at = ((router * splits + split) * num_entries + place[None, :]) * max_experts + expert[:, None]
        tl.store(scores_ptr + scores_at, acc, mask=has_entry[None, :])


@routed_jit
def choose_kernel(
    experts_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    slot_weights_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    units_ptr: tl.tensor,
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
    first_router: tl.tensor,
    router_sites: tl.constexpr,
    splits: tl.constexpr,
    most: tl.constexpr,
    max_experts: tl.constexpr,
) -> None:
    """One row's experts, best first, as in ``ops.route``: ``p = softmax(scores) / temperature``, at most its limit of
    them and none once those before it sum to more than top_p. A slot that is not filled has unit -1 and weight 0; so
    have all slots of an entry of unit -1, and of one whose adapter has no such router.
    """
    entry = tl.program_id(0)
    router = tl.program_id(1)
    expert = tl.arange(0, max_experts)
    place = tl.arange(0, most)
    unit = tl.load(units_ptr + entry)
    record = tl.load(record_of_ptr + unit * (num_layers + 1) + layer, mask=unit >= 0, other=-1)
    router_ptr = routers_ptr + (record * router_sites + first_router + router) * ROUTER_FIELDS
    known = tl.load(router_ptr, mask=record >= 0, other=0)
    has_expert = expert < known
    score = tl.zeros((max_experts,), tl.float32)
    for split in range(splits):
        at = ((router * splits + split) * num_entries + entry) * max_experts + expert
        score += tl.load(scores_ptr + at, mask=has_expert, other=0.0)
    top = tl.where(known > 0, tl.max(tl.where(has_expert, score, float("-inf")), 0), 0.0)
    raised = tl.where(has_expert, tl.exp(tl.where(has_expert, score - top, 0.0)), 0.0)
    temperature = tl.where(known > 0, tl.load(temperature_ptr + entry), 1.0)
    p = raised / tl.where(known > 0, tl.sum(raised, 0), 1.0) / temperature
    limit = tl.load(limits_ptr + entry)
    top_p = tl.load(top_p_ptr + entry)
    left = tl.where(has_expert, p, -1.0)
    before = 0.0
    total = 0.0
    best_first = tl.zeros((most,), tl.int32)
    weights = tl.zeros((most,), tl.float32)
    for turn in range(most):
        best = tl.max(left, 0)
        index = tl.min(tl.where(left == best, expert, max_experts), 0)
        taken = (turn < limit) & (best > 0) & ((turn == 0) | (before <= top_p))
        weight = tl.where(taken, best, 0.0)
        best_first = tl.where(place == turn, tl.where(best >= 0, index, 0), best_first)
        weights = tl.where(place == turn, weight, weights)
        total += weight
        before += tl.where(best > 0, best, 0.0)
        left = tl.where(expert == index, -1.0, left)
    chosen = weights > 0
    divide = (tl.load(renormalize_ptr + entry) != 0) & (total > 0)
    weights = weights / tl.where(divide, total, 1.0)
    slot = (router * num_entries + entry) * most + place
    tl.store(experts_ptr + slot, best_first)
    tl.store(chosen_ptr + slot, weights)
    tl.store(slot_units_ptr + slot, tl.where(chosen, unit + 1 + best_first, -1))
    tl.store(slot_weights_ptr + slot, weights * tl.load(mix_weights_ptr + entry))


@routed_jit
def sort_slots_kernel(
    sorted_rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    place_units_ptr: tl.tensor,
    place_counts_ptr: tl.tensor,
    slot_units_ptr: tl.tensor,
    slot_weights_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_slots: tl.tensor,
    most: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
    others: tl.constexpr,
) -> None:
    """Place slots in the order of their units, those not chosen last; a tile begins at every ``block_rows``-th slot of
    a unit, and there ``place_counts`` is the number of its slots, else 0.
    """
    base = tl.program_id(1) * num_slots
    slot = tl.program_id(0) * block + tl.arange(0, block)
    inside = slot < num_slots
    unit = tl.load(slot_units_ptr + base + slot, mask=inside, other=-1)
    key = tl.where(unit >= 0, unit, NOT_CHOSEN)
    smaller = tl.zeros((block,), tl.int32)
    equal_before = tl.zeros((block,), tl.int32)
    equal = tl.zeros((block,), tl.int32)
    start = 0
    while start < num_slots:
        other = start + tl.arange(0, others)
        is_slot = other < num_slots
        other_unit = tl.load(slot_units_ptr + base + other, mask=is_slot, other=-1)
        other_key = tl.where(other_unit >= 0, other_unit, NOT_CHOSEN)
        same = (other_key[None, :] == key[:, None]) & is_slot[None, :]
        smaller += tl.sum(((other_key[None, :] < key[:, None]) & is_slot[None, :]).to(tl.int32), 1)
        equal += tl.sum(same.to(tl.int32), 1)
        equal_before += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        start += others
    place = base + smaller + equal_before
    tl.store(sorted_rows_ptr + place, tl.load(rows_ptr + slot // most, mask=inside, other=0), mask=inside)
    tl.store(slots_ptr + place, slot, mask=inside)
    tl.store(weights_ptr + place, tl.load(slot_weights_ptr + base + slot, mask=inside, other=0.0), mask=inside)
    begins = (unit >= 0) & (equal_before % block_rows == 0)
    tl.store(place_units_ptr + place, tl.maximum(unit, 0), mask=inside)
    tl.store(place_counts_ptr + place, tl.where(begins, tl.minimum(equal - equal_before, block_rows), 0), mask=inside)


@routed_jit
def cut_tiles_kernel(
    tile_units_ptr: tl.tensor,
    tile_firsts_ptr: tl.tensor,
    tile_counts_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    place_units_ptr: tl.tensor,
    place_counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    tiles: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Bring the tiles that begin somewhere together; those left over have no entries. One program for each router."""
    base = tl.program_id(0) * num_slots
    tile_base = tl.program_id(0) * tiles
    found = 0
    start = 0
    while start < num_slots:
        place = start + tl.arange(0, block)
        count = tl.load(place_counts_ptr + base + place, mask=place < num_slots, other=0)
        begins = count > 0
        tile = tile_base + found + tl.cumsum(begins.to(tl.int32), 0) - 1
        unit = tl.load(place_units_ptr + base + place, mask=begins, other=0)
        tl.store(tile_units_ptr + tile, unit, mask=begins)
        tl.store(tile_firsts_ptr + tile, place, mask=begins)
        tl.store(tile_counts_ptr + tile, count, mask=begins)
        found += tl.sum(begins.to(tl.int32), 0)
        start += block
    tl.store(num_tiles_ptr + tl.program_id(0), found)
    none = tl.zeros((block,), tl.int32)
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, block)
        left_over = (tile >= found) & (tile < tiles)
        tl.store(tile_units_ptr + tile_base + tile, none, mask=left_over)
        tl.store(tile_firsts_ptr + tile_base + tile, none, mask=left_over)
        tl.store(tile_counts_ptr + tile_base + tile, none, mask=left_over)
        start += block
