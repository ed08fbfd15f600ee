from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraplex.server.cores import usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("0", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("400000 100000\n", 4),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("max 100000\n", 64),
        ("9900000 100000\n", 64),
        ("", 64),
        ("?", 64),
    ],
)
def test_a_quota_of_version_two_limits_the_cores(machine: Path, limit: str, cores: int) -> None:
    write(machine, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu0max=limit)
    assert usable_cores(machine) == cores


def test_the_least_quota_of_the_groups_above_counts(machine: Path) -> None:
    write(
        machine,
        proc__self__cgroup="0::/pod/container\n",
        sys__fs__cgroup__pod__container__cpu0max="800000 100000\n",
        sys__fs__cgroup__pod__cpu0max="300000 100000\n",
    )
    assert usable_cores(machine) == 3


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2), ("-1", 64)])
@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_one_limits_the_cores(machine: Path, quota: str, cores: int, mount: str) -> None:
    # Inside a container the group's path is the host's, and its folder is the mount itself.
    group = machine / "sys/fs/cgroup" / mount
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    write(machine, proc__self__cgroup="12:memory:/x\n4:cpu,cpuacct:/kubepods/pod1/c\n")
    assert usable_cores(machine) == cores


def test_without_control_groups_all_cores_count(machine: Path) -> None:
    assert usable_cores(machine) == 64


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
