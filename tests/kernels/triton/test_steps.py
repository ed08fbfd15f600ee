"""Kernels are compiled once for all steps: no step waits for a compiler because its counts or addresses are new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.without_gpu("kernels are compiled ahead of time, for GPUs that need not be there")
def test_steps_of_any_size_share_their_kernels(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_steps.py")), "90"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    compilations: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    assert len(compilations) > 15
    # The norm exists with and without an addition.
    assert {kernel for kernel, count in compilations.items() if count > 1} == {"_norm_row"}
    assert compilations["_norm_row"] == 2
