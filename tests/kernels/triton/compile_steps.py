"""Launches every kernel over steps of different sizes, and prints how often each is compiled for them.

``python compile_steps.py 90`` prints JSON: by kernel, how many different compilations. Between the steps, counts,
layers and where arrays begin change; all that a model and its adapters fix stays.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from math import prod

import compile_ahead
import torch

from loraplex.kernels import expert_launch, lora_operators, norms, paged_decode, paged_prefill, rope_write, route_launch
from loraplex.kernels.gated import launch_silu_mul
from loraplex.kernels.lora_tuning import choose_expand, choose_shrink

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_CHUNKS, RANK = 4096, 14336, 32, 30, 10, 128, 256, 64
STEPS = ((1, 0), (2, 1), (3, 7), (16, 16), (48, 31))
"""Rows, and the layer of a launch."""

PAGES = (torch.zeros(64).int(), torch.zeros(8).int(), torch.zeros(8, LAYERS + 1).int())
"""Of an adapter table: pages, first_page, record_of."""


class Arrays:
    """Zeros that begin at ``offset`` elements of a buffer."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def ints(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self._offset + prod(shape), dtype=torch.int32)[self._offset :].view(shape)

    def floats(self, *shape: int) -> torch.Tensor:
        return self.ints(*shape).view(torch.float32)


def values(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def attention(step: Arrays, rows: int) -> None:
    pages, rotary = values(4, 2, 16, KV_HEADS, HEAD_DIM), torch.zeros(64, HEAD_DIM)
    qkv = values(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    q = rope_write.launch_rope_write(qkv, step.ints(rows), rotary, None, None, 1e-5, pages, step.ints(rows))
    table, lengths, starts = step.ints(rows, 64), step.ints(rows), step.ints(rows + 1)
    paged_decode.launch_paged_decode(q, pages, table, lengths, step.ints(3 * rows, 2), starts, 0.1, 0)
    paged_prefill.launch_paged_prefill(q, pages, table, starts, lengths, step.ints(rows, 2), 0.1, 0)


def rows_alone(rows: int) -> None:
    x = values(rows, HIDDEN)
    norms.launch_rms_norm(x, x[0], 1e-5)
    norms.launch_add_rms_norm(x, x.clone(), x[0], 1e-5)
    launch_silu_mul(x)


def low_rank(step: Arrays, rows: int, layer: int) -> None:
    sizes, facts = [0, HIDDEN, HIDDEN, 1024, 1024], [0, 16, 16, 4, 4]
    table = [*PAGES, torch.zeros(8, 7, 4).int(), torch.zeros(8, 7)]
    tiles = [step.ints(rows) for _ in range(3)]
    starts = lora_operators.launch_count([tiles[0], tiles[2]], table[2], table[3], facts, 1, layer, LAYERS + 1 - layer)
    shrink, expand = choose_shrink(16, RANK, HIDDEN, 16), choose_expand(16, RANK, HIDDEN, 16)
    chunks, y, entries = values(PAGE_CHUNKS * 4, 128), values(rows, 6144), step.ints(rows)
    place = [layer, PAGE_CHUNKS]
    block = [RANK, 8, shrink.ranks, shrink.rows, shrink.chunks, shrink.warps, shrink.stages]
    given = (values(rows, HIDDEN), chunks, table, entries, [*tiles, starts])
    low = lora_operators.launch_shrink(*given, 2 * layer, place, sizes, block, 4, lookup=False)
    lora_operators.launch_sum_partial(low)
    lists = [entries, entries, step.floats(rows)]
    block = [expand.columns, expand.ranks, expand.rows, expand.warps, expand.stages]
    lora_operators.launch_expand(
        y, None, None, low, chunks, table, lists, [*tiles, starts], 4, place, sizes, block, 4,
        as_deltas=False, base_by_slot=False, gains=False,
    )  # fmt: skip
    sums = [entries, step.ints(rows + 1), entries]
    lora_operators.launch_sum_deltas(y, torch.zeros(rows, 6144), sums, table, layer, sizes)


def mixture(step: Arrays, rows: int, layer: int) -> None:
    most, capacity = 2, 8 * rows
    x, chunks = values(rows, HIDDEN), values(PAGE_CHUNKS, 128)
    tiles, numbers, floats = [step.ints(rows) for _ in range(4)], step.ints(rows), step.floats(rows)
    _, weights, units, by_slot = route_launch.launch_route(
        x, chunks, [*PAGES, torch.zeros(8, 8, 2).int()], tiles,
        [numbers, numbers, floats, numbers, numbers, floats, floats], most, 16, layer, layer % 7, 1, PAGE_CHUNKS,
    )  # fmt: skip
    places, slots, _, *cut = route_launch.launch_sort(units[0:1], by_slot[0:1], numbers, most, 16, capacity)
    table = [*PAGES, torch.zeros(8, 7, 4).int(), torch.zeros(8, 7)]
    by_tile = [array[0] for array in cut[:3]]
    hidden = expert_launch.launch_expert_hidden(
        values(rows, 2 * FFN), None, torch.zeros(8, rows * most, 32), chunks, table,
        [numbers, places[0], slots[0]], [*by_tile, step.ints(1)], most, 16, layer, PAGE_CHUNKS, 4, 1, gains=False,
    )  # fmt: skip
    sums = (numbers, step.ints(rows + 1))
    expert_launch.launch_combine(values(rows, FFN), hidden, units[0], by_slot[0], *sums)
    expert_launch.launch_share_bias(values(rows, HIDDEN), values(HIDDEN), weights[0], *sums)


def launch_all(rows: int, layer: int) -> None:
    step = Arrays(offset=rows % 4)
    attention(step, rows)
    rows_alone(rows)
    low_rank(step, rows, layer)
    mixture(step, rows, layer)


def main(target: int) -> None:
    compile_ahead.CASES.update({f"{rows} rows": lambda r=rows, i=layer: launch_all(r, i) for rows, layer in STEPS})
    found: defaultdict[str, set[str]] = defaultdict(set)
    for kernel in compile_ahead.launched(target, [f"{rows} rows" for rows, _ in STEPS]):
        found[kernel.metadata.name].add(kernel.hash)
    print(json.dumps({name: len(hashes) for name, hashes in found.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
