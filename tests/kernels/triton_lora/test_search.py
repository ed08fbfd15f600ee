"""Blocks find their tile among any number of tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_triton import first_ends, tile_of_block
from loraplex.kernels.triton_runtime import jit, tl


@jit
def find_tiles(found: tl.tensor, starts: tl.tensor, tiles: tl.tensor) -> None:
    block = tl.program_id(0)
    tl.store(found + block, tile_of_block(starts, first_ends(starts, tiles), block, tiles))


@pytest.mark.parametrize("tiles", [1, 2, 64, 128, 4096, 16384])
def test_a_block_belongs_to_the_tile_whose_blocks_include_it(tiles: int, device: torch.device) -> None:
    random = np.random.default_rng(tiles)
    counts = np.zeros(tiles, dtype=np.int32)
    np.add.at(counts, [0, tiles - 1, *random.integers(0, tiles, 14)], random.integers(1, 4, 16))
    starts = np.full(tiles + 4, -7, dtype=np.int32)
    starts[: tiles + 1] = [0, *np.cumsum(counts)]
    found = torch.full((int(starts[tiles]),), -1, dtype=torch.int32, device=device)
    find_tiles[(len(found),)](found, torch.from_numpy(starts).to(device), tiles)
    assert found.tolist() == np.repeat(np.arange(tiles), counts).tolist()
