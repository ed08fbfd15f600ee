"""The kernels of mixtures compile for every kind of GPU that is served, within its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 90, 100)
REGISTERS = {
    "router_scores_kernel": 176,
    "choose_kernel": 48,
    "sort_slots_kernel": 120,
    "cut_tiles_kernel": 96,
    "expert_hidden_kernel": 176,
    "combine_kernel": 40,
    "share_bias_kernel": 32,
}
"""Of a thread."""

OF_DECODE = 128
"""The same of the smallest tiles of experts, which decoding uses: two blocks of eight warps at a time."""

SHARED = 32 * 1024
"""Bytes of a block."""

FRAME = {80: 0, 90: 0, 100: 8}
"""Bytes of a thread's stack; with products in tensor memory the compiler makes one though nothing is spilled."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(Path(__file__).with_name("compile_mixtures.py")), *map(str, CAPABILITIES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.without_gpu("kernels are compiled ahead of time, for GPUs that need not be there")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_fits(records: list[dict[str, Any]], capability: int) -> None:
    here = [record for record in records if record["target"] == capability]
    assert {record["kernel"] for record in here} == set(REGISTERS)
    for record in here:
        of_decode = record["kernel"] == "expert_hidden_kernel" and "decode" in record["case"]
        assert record["registers"] <= (OF_DECODE if of_decode else REGISTERS[record["kernel"]]), record
        assert record["spills"] <= FRAME[capability], record
        assert record["shared"] <= SHARED, record
    # Blocks of any number of entries take the same kind of instruction, so they sum in the same order.
    experts = [r for r in here if r["kernel"] == "expert_hidden_kernel" and r["case"] != "fp32"]
    assert len({(record["wgmma"], record["tcgen05"]) for record in experts}) == 1
