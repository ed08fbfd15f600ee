"""Compiles the kernels of mixtures for GPUs that need not be there, as ``../triton/compile_ahead.py`` does the others.

``python compile_mixtures.py 80 90 100`` prints its records. Sizes are those of a model of 8 billion parameters.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from loraplex.kernels import expert_launch, route_launch

HIDDEN, FFN, LAYERS, PAGE_CHUNKS = 4096, 14336, 32, 256


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def route(dtype: torch.dtype, max_experts: int, most: int) -> None:
    rows, floats = 64, torch.zeros(64)
    x, chunks = torch.zeros(rows, HIDDEN, dtype=dtype), torch.zeros(PAGE_CHUNKS, 128, dtype=dtype)
    table = [ints(64), ints(8), ints(8, LAYERS + 1), ints(8, 8, 2)]
    tiles = [ints(rows), ints(16), ints(16), ints(16)]
    entries = [ints(rows), ints(rows), floats, ints(rows), ints(rows), floats, floats]
    _, _, units, weights = route_launch.launch_route(
        x, chunks, table, tiles, entries, most, max_experts, 3, 4, 3, PAGE_CHUNKS
    )
    route_launch.launch_sort(units, weights, ints(rows), most, 16, 128)


def experts(dtype: torch.dtype, tile_rows: int, parts: int, *, full: bool) -> None:
    """``full``: with biases and gains."""
    rows, most = 64, 2
    slots, tiles = ints(rows * most), ints(128)
    gate_up, chunks = torch.zeros(rows, 2 * FFN, dtype=dtype), torch.zeros(PAGE_CHUNKS, 128, dtype=dtype)
    bias = torch.zeros(2 * FFN, dtype=dtype) if full else None
    low = torch.zeros(parts, rows * most, 32)
    table = [ints(64), ints(8), ints(8, LAYERS + 1), ints(8, 7, 4), torch.zeros(8, 7)]
    hidden = expert_launch.launch_expert_hidden(
        gate_up,
        bias,
        low,
        chunks,
        table,
        [ints(rows), slots, slots],
        [tiles, tiles, tiles, ints(1)],
        most,
        tile_rows,
        3,
        PAGE_CHUNKS,
        4,
        1,
        full,
    )
    h, y = torch.zeros(rows, FFN, dtype=dtype), torch.zeros(rows, HIDDEN, dtype=dtype)
    sums = (ints(rows), ints(rows + 1))
    expert_launch.launch_combine(h, hidden, slots, torch.zeros(rows * most), *sums)
    expert_launch.launch_share_bias(y, y[0], torch.zeros(rows, most), *sums)


CASES: dict[str, Callable[[], None]] = {
    "route bf16": partial(route, torch.bfloat16, 16, 2),
    "route of 64 experts": partial(route, torch.float16, 64, 8),
    "route fp32": partial(route, torch.float32, 16, 1),
    "decode": partial(experts, torch.bfloat16, 16, 8, full=False),
    "decode with gains": partial(experts, torch.bfloat16, 16, 8, full=True),
    "prefill": partial(experts, torch.bfloat16, 256, 1, full=False),
    "prefill with gains": partial(experts, torch.float16, 64, 1, full=True),
    "fp32": partial(experts, torch.float32, 64, 8, full=True),
}


def main(targets: list[int]) -> None:
    path = Path(__file__).parents[1] / "triton" / "compile_ahead.py"
    spec = importlib.util.spec_from_file_location("compile_ahead", path)
    assert spec is not None
    assert spec.loader is not None
    ahead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ahead)
    ahead.CASES.update(CASES)
    print(json.dumps([record for target in targets for record in ahead.compiled(target, CASES)]))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
