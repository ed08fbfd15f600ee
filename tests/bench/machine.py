"""What the machine can do at best, measured: the floor that a benchmark's figures stand beside."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loraplex.kernels.dense_linear import DenseLinear


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median time of one call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def matmul_rate(dtype: torch.dtype, rows: int = 512) -> float:
    """FLOP/s of a large product as the engine does it."""
    weight = torch.randn(4864, 896).to(dtype)
    x = torch.randn(rows, 896).to(dtype)
    linear = DenseLinear(weight)
    return 2 * rows * weight.numel() / seconds(lambda: linear(x))


def read_bandwidth() -> float:
    """Bytes per second of reading memory that fits no cache."""
    data = torch.ones(128 * 1024 * 1024)
    return data.numel() * data.element_size() / seconds(data.sum)


def describe() -> dict[str, Any]:
    """The machine and the code that ran on it."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
