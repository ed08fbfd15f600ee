"""Times shapes of the low-rank kernels' blocks on the GPU at hand and prints the tables of ``kernels/lora_tuning.py``.

For each sum of ranks, width and tile: as many distinct adapters as a step may have, over enough layers that nothing
stays in the cache, replayed as one graph. From the table at hand on, one number of a shape is changed at a time,
shrink's first; a change is kept where it is quicker by more than the noise. None changes a result. The last line of the
output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkout  # noqa: F401  (before anything of loraplex)
import numpy as np
import random_adapters
import torch
from context import on_device
from costs import ModelShape
from host_model import HostModel
from timing import captured, seconds

from loraplex.kernels import lora_launch
from loraplex.kernels.lora_grid import GroupLaunch
from loraplex.kernels.lora_launch import StepWork, add_entries
from loraplex.kernels.lora_tiles import ROW_BLOCKS, DeviceEntries, list_entries
from loraplex.kernels.lora_tuning import ExpandShape, Key, ShrinkShape, key_of

RANKS = (16, 32, 64, 128)
WIDTHS = (1024, 4096, 14336)
GAIN = 0.97
"""A shape must take at most so much of the table's time to take its place."""

Choices = Mapping[str, Sequence[int]]

_BYTES = 512 << 20  # several times what the cache holds
_MOST_LAYERS = 32
_TILE_ENTRIES = 1024
"""Entries of a step: as many distinct adapters as make so many tiles of them, from 4 to 64."""

SHRINK_CHOICES: Choices = {
    "ranks": (16, 32),
    "rows": (16, 32, 64),
    "chunks": (1, 2, 4),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}
EXPAND_CHOICES: Choices = {
    "columns": (128, 256),
    "ranks": (16, 32, 64),
    "rows": (16, 32, 64),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


@dataclass(frozen=True, slots=True)
class Found:
    """The best shapes of a case and their seconds; ``before`` with the table at hand."""

    key: Key
    shrink: ShrinkShape
    expand: ExpandShape
    before: float
    after: float


class Case:
    """One sum of ranks, width and tile: a step over one square site whose work fills the device.

    Args:
        rank, width: of the site; its input is as wide as its output.
        block_rows: entries of each adapter, one tile.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, rank: int, width: int, block_rows: int) -> None:
        self.key = key_of(dtype.itemsize * 8, rank, width, block_rows)
        self._device, self._rounds = device, 9 if device.type == "cuda" else 1
        count = min(64, max(4, _TILE_ENTRIES // block_rows)) if device.type == "cuda" else 2
        layer_bytes = count * rank * 2 * width * dtype.itemsize
        layers = min(_MOST_LAYERS, max(1, _BYTES // layer_bytes)) if device.type == "cuda" else 1
        heads = width // 128
        shape = ModelShape("square", layers, width, width, heads, heads, 128, 512, 1024)
        spec = random_adapters.lora(shape, rank, ("o_proj",))
        host = HostModel(shape, dtype=dtype, device=device)
        layout = host.layout(spec)
        adapters = [host.resident(layout, spec) for _ in range(count)]
        pages = count * host.pages_of(layout)
        self._arena = torch.empty((layers, pages, host.pages.page_elems), device=device, dtype=dtype).normal_(0, 0.02)
        (self._group,) = (group for group in host.groups if group.sites == ("o_proj",))
        self._table = host.table
        units = np.repeat([host.table.unit_of(adapter) for adapter in adapters], block_rows)
        lists = list_entries(units.astype(np.int64), np.arange(len(units)), block_rows=block_rows)
        self._entries = DeviceEntries.copy_of(lists, device)
        self._x = torch.empty((len(units), width), device=device, dtype=dtype).normal_()
        self._y = torch.zeros_like(self._x)
        self.launch = GroupLaunch.at(
            host.table, 0, self._group, bits=dtype.itemsize * 8, entries=len(units), block_rows=block_rows
        )

    def _work(self, launch: GroupLaunch) -> StepWork:
        """As ``StepWork.of``, for one group under a launch that may not be the table's."""
        starts = lora_launch._count(self._entries, self._table, [launch.facts], 1, 0, self._table.num_layers)
        return StepWork(starts, 0, {self._group.sites: (0, launch)})

    def seconds(self, launch: GroupLaunch) -> float:
        """Of the work at the site in all layers."""
        work = self._work(launch)

        @torch.inference_mode()
        def run() -> None:
            for layer, arena in enumerate(self._arena):
                add_entries(self._y, self._x, arena.view(-1, 128), self._table, self._entries, work, layer, self._group)

        return seconds(captured(run, self._device, warmup=1), self._device, rounds=self._rounds, warmup=1)


def best(case: Case, shrinks: Choices, expands: Choices) -> Found:
    """Change one number of a shape at a time, shrink's first, and keep what is quicker."""
    launch = case.launch
    before = quickest = case.seconds(launch)
    for kernel, choices in (("shrink", shrinks), ("expand", expands)):
        for name, values in choices.items():
            for value in values:
                shape = getattr(launch, kernel)
                if value == getattr(shape, name) or (name == "rows" and value > case.key[3]):
                    continue
                tried = replace(launch, **{kernel: replace(shape, **{name: value})})
                took = _try(case.seconds, tried)
                if took < quickest * GAIN:
                    launch, quickest = tried, took
    return Found(case.key, launch.shrink, launch.expand, before, quickest)


def _try(time_of: Callable[[GroupLaunch], float], launch: GroupLaunch) -> float:
    """Seconds; infinite where a shape cannot run, for want of registers or shared memory."""
    try:
        return time_of(launch)
    except Exception as error:
        print(f"{launch.shrink} {launch.expand}: {type(error).__name__}", file=sys.stderr)
        return float("inf")


def table(found: Sequence[Found]) -> str:
    """The lines for ``SHRINK`` and ``EXPAND``."""
    lines = ["SHRINK:"]
    lines += [
        f"        {one.key}: {_call(one.shrink)},  # {one.before * 1e6:.0f} -> {one.after * 1e6:.0f} us"
        for one in found
    ]
    lines += ["EXPAND:", *(f"        {one.key}: {_call(one.expand)}," for one in found)]
    return "\n".join(lines)


def _call(shape: ShrinkShape | ExpandShape) -> str:
    values = [getattr(shape, name) for name in type(shape).__slots__]
    return f"{type(shape).__name__}({', '.join(map(str, values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--tiles", type=int, nargs="*", default=ROW_BLOCKS, choices=ROW_BLOCKS)
    parser.add_argument("--values", type=int, help="try so many values of each number alone")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which no further case is begun")
    arguments = parser.parse_args()
    device, dtype = on_device(arguments.device)
    deadline = time.monotonic() + arguments.seconds
    found = []
    for tile, width, rank in product(arguments.tiles, arguments.widths, arguments.ranks):
        if time.monotonic() > deadline:
            print(f"out of time before tile {tile}, width {width}, rank {rank}", file=sys.stderr)
            break
        case = Case(device, dtype, rank, width, tile)
        choices = (
            {name: values[: arguments.values] for name, values in some.items()}
            for some in (SHRINK_CHOICES, EXPAND_CHOICES)
        )
        found.append(best(case, *choices))
        print(f"{found[-1]}", file=sys.stderr, flush=True)
    print(table(found))
    rows = [
        {
            "key": one.key,
            "shrink": _call(one.shrink),
            "expand": _call(one.expand),
            "before": one.before,
            "after": one.after,
        }
        for one in found
    ]
    print(json.dumps({"benchmark": "tune", "dtype": str(dtype), "found": rows}))


if __name__ == "__main__":
    main()
