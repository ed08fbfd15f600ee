"""The launches of an engine's steps, as a GPU's Triton sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.without_gpu("there the kernels themselves are launched")
def test_what_steps_launch_can_be_compiled_and_is_before_a_graph_is_captured(
    checkpoints: Callable[[str], Any], small_kinds: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    base = checkpoints("small-llama")
    for kind, folder in small_kinds(base, "lora", "dora", "ends", "mola", "mixlora").items():
        (tmp_path / kind).symlink_to(folder, target_is_directory=True)
    program = Path(__file__).with_name("compile_steps.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), str(base.folder), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["in_capture"]
    kernels = {"count_work_kernel", "shrink_kernel", "expand_kernel", "row_sum_kernel", "lookup_kernel"}
    kernels |= {"choose_kernel", "expert_hidden_kernel", "_decode_splits", "_prefill_tiles"}
    assert kernels <= set(found["variants"])
