"""How many cores this process may keep busy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that the scheduler lets this process run on, and no more than its control group's quota pays for.

    A container with ``limits.cpu: 4`` on a machine of 64 cores sees all 64. With as many threads it would use up its
    quota in a fraction of each period, and stand still for the rest.

    Args:
        root: of the file system, for tests.

    Returns:
        At least 1; parts of a core do not count beyond that.
    """
    quota = min(_quotas(root), default=float("inf"))
    return max(1, int(min(len(os.sched_getaffinity(0)), quota)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores by the quotas of the process's control group and of those above it, in either version."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            for folder in _upwards(root / "sys/fs/cgroup", path):
                if words := " ".join(_lines(folder / "cpu.max")).split():
                    yield from _cores(words[0], words[-1])
        elif "cpu" in controllers.split(","):
            for mount in (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"):
                for folder in _upwards(mount, path):
                    quota, period = (_lines(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                    if quota and period:
                        yield from _cores(quota[0], period[0])


def _cores(quota: str, period: str) -> Iterator[float]:
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return
    if cores > 0:  # -1 is no quota
        yield cores


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A group's folder and those above it; inside a container those may be all that there are."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
