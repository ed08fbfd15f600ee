"""Processes of a container, seen and killed from outside it: the first process of a container cannot be from within."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil


def processes_of(container: str) -> list[psutil.Process]:
    """The processes in a container's cgroup, oldest first; the first one is what the image starts."""
    found = []
    for process in psutil.process_iter():
        try:
            if container in Path(f"/proc/{process.pid}/cgroup").read_text():
                found.append(process)
        except OSError:
            continue
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def server_of(container: str) -> psutil.Process:
    """The HTTP process: the eldest that runs ``loraplex``."""
    return next(process for process in processes_of(container) if "loraplex" in " ".join(process.cmdline()))


def engine_of(container: str) -> psutil.Process:
    """The engine's process."""
    return next(one for one in processes_of(container) if "loraplex.server.engine_process" in one.cmdline())


def kill(process: psutil.Process) -> None:
    """Kill -9."""
    os.kill(process.pid, signal.SIGKILL)
