"""The kernels of ``route_triton.py`` as ``torch.library`` operators: the choice of experts, and their slots sorted."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.kernels.lora_rows import CHUNK
from loraplex.kernels.route_triton import choose_kernel, cut_tiles_kernel, router_scores_kernel, sort_slots_kernel
from loraplex.kernels.routed_lists import MIN_EXPERTS, ROUTER_ROWS
from loraplex.kernels.triton_runtime import INTERPRETED, power_of_two

Tensors = list[torch.Tensor]

SCORE_CHUNKS = 8
"""Chunks of the input that a block scores at a time. Fixed, as it decides the order of a score's sum."""

SCORE_WARPS, CHOOSE_WARPS, SORT_WARPS, CUT_WARPS = 4, 1, 4, 4

SORT_BLOCK, SORT_OTHERS = 32, 128
"""Slots that a block places, and that it compares them with at a time."""

CUT_BLOCK = 1024
"""Places among which a block looks for tiles at a time."""

_library = torch.library.Library("loraplex", "FRAGMENT")
_library.define(
    "route_on_device(Tensor x, Tensor chunks, Tensor[] table, Tensor[] tiles, Tensor[] entries, int most,"
    " int max_experts, int layer, int first_router, int num_routers, int page_chunks)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sort_on_device(Tensor slot_units, Tensor slot_weights, Tensor rows, int most, int block_rows, int tiles)"
    " -> Tensor[]"
)


def launch_route(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    tiles: Tensors,
    entries: Tensors,
    most: int,
    max_experts: int,
    layer: int,
    first_router: int,
    num_routers: int,
    page_chunks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let consecutive routers of a layer, which read the same input, choose for all routed entries.

    Args:
        x: [rows, in_features].
        chunks: [num_chunks, 128], the arena of the layer.
        table: pages, first_page, record_of, routers of an ``AdapterTable``.
        tiles: score_places, tile_units, tile_firsts, tile_counts of a ``DeviceRouted``.
        entries: its rows, units, weights, limits, renormalize, top_p, temperature.
        first_router: the place of the first of them in ``table``.

    Returns:
        Experts [routers, R, most] int32 best first, their weights [routers, R, most] float32; the same by slot as units
        [routers, slots] int32, -1 where none is chosen, and weights with those of a mix.
    """
    pages, first_page, record_of, routers = table
    rows, *choosing = entries
    count, num_layers = len(rows), record_of.shape[1] - 1
    wide_chunk = CHUNK * chunks.element_size() // 4
    in_chunks = -(-x.shape[1] // wide_chunk)
    split_chunks = min(SCORE_CHUNKS, in_chunks)
    splits = -(-in_chunks // split_chunks)
    site = {"router_sites": routers.shape[1], "splits": splits, "max_experts": max_experts}
    scores = x.new_empty((num_routers, splits, count, max_experts), dtype=torch.float32)
    router_scores_kernel[(len(tiles[1]) * splits, num_routers, max_experts // MIN_EXPERTS)](
        scores,
        x,
        chunks.view(torch.float32),
        pages,
        first_page,
        record_of,
        routers,
        rows,
        *tiles,
        count,
        x.stride(0),
        layer,
        num_layers,
        first_router,
        in_features=x.shape[1],
        split_chunks=split_chunks,
        wide_chunk=wide_chunk,
        page_chunks=page_chunks,
        block_rows=ROUTER_ROWS,
        block_experts=MIN_EXPERTS,
        num_warps=SCORE_WARPS,
        **site,
    )
    found = _route_buffers(x, count, most, num_routers)
    choose_kernel[(count, num_routers)](
        *found,
        scores,
        *choosing,
        record_of,
        routers,
        count,
        layer,
        num_layers,
        first_router,
        most=most,
        num_warps=CHOOSE_WARPS,
        **site,
    )
    return found


def _route_buffers(
    x: torch.Tensor, count: int, most: int, num_routers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty((num_routers, count, most), dtype=torch.int32),
        x.new_empty((num_routers, count, most), dtype=torch.float32),
        x.new_empty((num_routers, count * most), dtype=torch.int32),
        x.new_empty((num_routers, count * most), dtype=torch.float32),
    )


def launch_sort(
    slot_units: torch.Tensor, slot_weights: torch.Tensor, rows: torch.Tensor, most: int, block_rows: int, tiles: int
) -> Tensors:
    """Sort the filled slots of each router by unit, and cut them into tiles.

    Args:
        slot_units, slot_weights: [routers, slots], as ``launch_route`` returns them.
        rows: [R] of the entries.
        block_rows: places of a tile at most.
        tiles: T, as many as there may be (see ``most_tiles``).

    Returns:
        By place, [routers, slots] each: rows, slots, weights. By tile, [routers, T] each: units, first places, counts.
        Numbers of tiles [routers].
    """
    num_routers, slots = slot_units.shape
    found = _sort_buffers(slot_units, slot_weights, tiles)
    by_slot, by_tile = found[:3], found[3:]
    place_units, place_counts = torch.empty_like(slot_units), torch.empty_like(slot_units)
    sort_slots_kernel[(-(-slots // SORT_BLOCK), num_routers)](
        *by_slot,
        place_units,
        place_counts,
        slot_units,
        slot_weights,
        rows,
        slots,
        most=most,
        block_rows=block_rows,
        block=SORT_BLOCK,
        others=SORT_OTHERS,
        num_warps=SORT_WARPS,
    )
    cut_tiles_kernel[(num_routers,)](
        *by_tile, place_units, place_counts, slots, tiles, block=CUT_BLOCK, num_warps=CUT_WARPS
    )
    return found


def most_tiles(slots: int, block_rows: int, units: int) -> int:
    """A power of two, not below the tiles into which so many slots of so many units may be cut."""
    return power_of_two(min(slots, slots // block_rows + units))


def _sort_buffers(slot_units: torch.Tensor, slot_weights: torch.Tensor, tiles: int) -> Tensors:
    num_routers = len(slot_units)
    return [
        torch.empty_like(slot_units),
        torch.empty_like(slot_units),
        torch.empty_like(slot_weights),
        *(slot_units.new_empty((num_routers, tiles)) for _ in range(3)),
        slot_units.new_empty((num_routers,)),
    ]


def _route_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _route_buffers(arguments[0], len(arguments[4][0]), arguments[5], arguments[9])


def _sort_fake(slot_units: torch.Tensor, slot_weights: torch.Tensor, *arguments: Any) -> Tensors:
    return _sort_buffers(slot_units, slot_weights, arguments[3])


torch.library.register_fake("loraplex::route_on_device", _route_fake)
torch.library.register_fake("loraplex::sort_on_device", _sort_fake)
for _name, _launch in (("route_on_device", launch_route), ("sort_on_device", launch_sort)):
    _library.impl(_name, _launch, "CPU" if INTERPRETED else "CUDA")

ROUTE_OPERATORS = torch.ops.loraplex
"""The namespace of the operators above."""
