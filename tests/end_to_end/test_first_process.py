"""A server as the first process of a container, whom the kernel spares from signals that it does not handle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

TERM_BIT = 1 << (signal.SIGTERM - 1)


def handles_sigterm(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) & TERM_BIT)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_first_process_that_is_still_starting_ends_on_sigterm(wait_until: Callable[..., bool]) -> None:
    loraplex = Path(sys.executable).with_name("loraplex")
    command = ["unshare", "--pid", "--fork", "--kill-child", str(loraplex), "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as outer:
        try:
            children = psutil.Process(outer.pid).children
            assert wait_until(lambda: any(handles_sigterm(child) for child in children()))
            (first,) = children()
            first.send_signal(signal.SIGTERM)
            assert outer.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            outer.kill()
