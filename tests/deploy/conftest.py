"""What tests of the deployment share: tools of the machine, which users may lack and CI must have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest


def find_tool(name: str) -> str:
    """Path of a program. Without it the test is skipped, or fails where the variable CI is "true"."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """``require_tool("promtool")``: path of a program. Without it the test is skipped, or fails where CI is "true"."""
    return find_tool
