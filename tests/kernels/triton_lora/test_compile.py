"""The low-rank kernels compile for every kind of GPU that is served, within its registers and shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (90, 80, 100)
REGISTERS = {"shrink_kernel": 176, "expand_kernel": 255, "row_sum_kernel": 64, "lookup_kernel": 96}
PLAIN_DECODE = {
    80: {"shrink_kernel": 168, "expand_kernel": 168},
    90: {"shrink_kernel": 128, "expand_kernel": 128},
    100: {"shrink_kernel": 168, "expand_kernel": 128},
}
"""Of a thread, by capability; those of the smallest tiles without gains, which decoding uses, leave room for more
blocks at a time: at 128 there are four on a multiprocessor."""

SPILLS = 32
"""Bytes that the compiler may put aside to fit one more block, where there are gains or operands are wide."""

SHARED = 64 * 1024
"""Bytes, so that two blocks fit on the smallest of these GPUs."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(program), "bf16,fp32", *map(str, CAPABILITIES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.without_gpu("kernels are compiled ahead of time, for GPUs that need not be there")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_configuration_fits_and_multiplies_alike(compiled: list[dict[str, Any]], capability: int) -> None:
    here = [one for one in compiled if one["capability"] == capability]
    assert {one["kernel"] for one in here} >= {"shrink_kernel", "expand_kernel", "row_sum_kernel"}
    for one in here:
        decodes = one.get("rows") == 16 and not one.get("gains")
        budget = {**REGISTERS, **PLAIN_DECODE[capability]} if decodes else REGISTERS
        assert one["registers"] <= budget.get(one["kernel"], 128), one
        assert one["spills"] <= (SPILLS if one.get("gains") or one["dtype"] == "fp32" else 0), one
        assert one["shared"] <= SHARED, one
    # Tiles of any size take the same instruction but for its columns, so they sum in the same order.
    for kernel in ("shrink_kernel", "expand_kernel"):
        used = {i for one in here if one["kernel"] == kernel for i in one["instructions"]}
        assert len({re.sub(r"n\d+k", "k", instruction) for instruction in used}) == 1, used
