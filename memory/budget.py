"""How much memory there is, and how many pages the pool gets of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation on the device could have now; on the host, a container's limit counts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was needed only to read the weights
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    limit, used = _read_number(_CGROUP_LIMIT), _read_number(_CGROUP_USED)
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _read_number(file: Path) -> int | None:
    """A cgroup's number; None where there is no such file or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def count_pages(
    *, pool_bytes: int | None, memory_fraction: float, available: int, page_bytes: int, step_bytes: int = 0
) -> int:
    """Pages of the pool: of ``pool_bytes`` where given, else of a fraction of the available memory.

    Args:
        step_bytes: of the available memory, what steps need and the fraction is not of.

    Raises:
        ValueError: not even one page fits; the message has the numbers.
    """
    budget = pool_bytes if pool_bytes is not None else int(max(available - step_bytes, 0) * memory_fraction)
    if budget > available:
        raise ValueError(f"pool_bytes is {budget}, but only {available} bytes are available on the device")
    num_pages = budget // page_bytes
    if num_pages < 1:
        raise ValueError(
            f"the pool has {budget} bytes, but one page takes {page_bytes}; {available} bytes are available on the "
            f"device, and steps may need {step_bytes}"
        )
    return num_pages
