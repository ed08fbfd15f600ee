"""The kernels of ``expert_triton.py`` as ``torch.library`` operators."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.kernels.expert_triton import combine_kernel, expert_hidden_kernel, share_bias_kernel
from loraplex.kernels.lora_grid import resident_programs
from loraplex.kernels.lora_rows import CHUNK
from loraplex.kernels.triton_runtime import INTERPRETED

Tensors = list[torch.Tensor]

HIDDEN_ROWS = {16: 64, 32: 16}
"""Entries that a block takes at a time at most, by the bits of the dtype: its two sums have to stay in registers."""

HIDDEN_RANKS = {16: 32, 32: 16}
"""Rank rows that it multiplies at a time."""

HIDDEN_WARPS = 8

SUM_COLUMNS = 512
SUM_WARPS = 4

_library = torch.library.Library("loraplex", "FRAGMENT")
_library.define(
    "expert_hidden(Tensor gate_up, Tensor? bias, Tensor low, Tensor chunks, Tensor[] table, Tensor[] entries,"
    " Tensor[] tiles, int most, int tile_rows, int layer, int page_chunks, int first_site, int activation, bool gains)"
    " -> Tensor"
)
_library.define(
    "combine_experts(Tensor(a!) to, Tensor hidden, Tensor slot_units, Tensor slot_weights, Tensor sum_rows,"
    " Tensor slot_starts) -> ()"
)
_library.define("share_bias(Tensor(a!) y, Tensor bias, Tensor weights, Tensor sum_rows, Tensor slot_starts) -> ()")


def launch_expert_hidden(
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    chunks: torch.Tensor,
    table: Tensors,
    entries: Tensors,
    tiles: Tensors,
    most: int,
    tile_rows: int,
    layer: int,
    page_chunks: int,
    first_site: int,
    activation: int,
    gains: bool,
) -> torch.Tensor:
    """``hidden[slot] = act(gate) * up`` of the filled slots, [slots, ffn] in the dtype of ``gate_up``.

    Args:
        gate_up: [rows, 2 * ffn], the base products.
        bias: [2 * ffn] that is in them, or None.
        low: [parts, slots, R] float32, by place.
        chunks: [num_chunks, 128], the arena of the layer.
        table: ``AdapterTable.tensors``.
        entries: codes of activations [rows of the routed], rows and slots by place.
        tiles: units, first places, counts, number of tiles.
        tile_rows: places of a tile at most.
        first_site: gate_proj among the table's sites.
        activation: code of the base's.
        gains: whether any expert may have some.
    """
    pages, first_page, record_of, records, scales = table
    activations, rows, slots = entries
    hidden = _hidden_buffer(gate_up, slots)
    width = hidden.shape[1]
    bits = chunks.element_size() * 8
    block_rows = min(tile_rows, HIDDEN_ROWS[bits])
    blocks = min(len(tiles[0]), len(slots)) * -(-width // CHUNK) * (tile_rows // block_rows)
    expert_hidden_kernel[(min(blocks, resident_programs(gate_up.device, HIDDEN_WARPS)),)](
        hidden,
        gate_up,
        gate_up if bias is None else bias,
        low,
        chunks,
        pages,
        first_page,
        record_of,
        records,
        scales,
        activations,
        rows,
        slots,
        *tiles,
        low.stride(0),
        low.stride(1),
        gate_up.stride(0),
        layer,
        record_of.shape[1] - 1,
        first_site=first_site,
        table_sites=records.shape[1],
        width=width,
        most=most,
        parts=low.shape[0],
        page_chunks=page_chunks,
        tile_rows=tile_rows,
        block_rows=block_rows,
        block_ranks=HIDDEN_RANKS[bits],
        base_activation=activation,
        biased=bias is not None,
        gains=gains,
        wide=INTERPRETED and chunks.dtype != torch.float32,
        num_warps=HIDDEN_WARPS,
        enable_fp_fusion=False,
    )
    return hidden


def _hidden_buffer(gate_up: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((slots.shape[0], gate_up.shape[1] // 2))


def launch_combine(
    to: torch.Tensor,
    hidden: torch.Tensor,
    slot_units: torch.Tensor,
    slot_weights: torch.Tensor,
    sum_rows: torch.Tensor,
    slot_starts: torch.Tensor,
) -> None:
    """``to[row] = sum of weight * hidden[slot]`` over a row's filled slots; rows without one are left as they are.

    Args:
        to: [rows, ffn].
        hidden: [slots, ffn].
        slot_units, slot_weights: [slots].
        sum_rows, slot_starts: [M] and [M + 1], which slots are a row's.
    """
    width = to.shape[1]
    combine_kernel[(len(sum_rows), -(-width // SUM_COLUMNS))](
        to,
        hidden,
        slot_units,
        slot_weights,
        sum_rows,
        slot_starts,
        to.stride(0),
        width=width,
        block=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )


def launch_share_bias(
    y: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor,
    sum_rows: torch.Tensor,
    slot_starts: torch.Tensor,
) -> None:
    """``y[row] += (sum of its weights - 1) * bias`` for each adapter whose router chose for a row.

    Args:
        y: [rows, width].
        bias: [width].
        weights: [R, most] float32, those of a mix left out.
        sum_rows, slot_starts: as of ``launch_combine``.
    """
    width = y.shape[1]
    share_bias_kernel[(len(sum_rows), -(-width // SUM_COLUMNS))](
        y,
        bias,
        weights,
        sum_rows,
        slot_starts,
        y.stride(0),
        width=width,
        most=weights.shape[1],
        block=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )


def _hidden_fake(gate_up: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _hidden_buffer(gate_up, arguments[4][2])


def _changes_in_place(*_: object) -> None:
    return None


torch.library.register_fake("loraplex::expert_hidden", _hidden_fake)
torch.library.register_fake("loraplex::combine_experts", _changes_in_place)
torch.library.register_fake("loraplex::share_bias", _changes_in_place)
for _name, _launch in (
    ("expert_hidden", launch_expert_hidden),
    ("combine_experts", launch_combine),
    ("share_bias", launch_share_bias),
):
    _library.impl(_name, _launch, "CPU" if INTERPRETED else "CUDA")

EXPERT_OPERATORS = torch.ops.loraplex
"""The namespace of the operators above."""
