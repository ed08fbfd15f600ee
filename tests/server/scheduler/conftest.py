"""A scheduler to poke at, and one in a simulated engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(f"tests_scheduler_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_rig() -> Any:
    """Makes a ``Rig`` (see ``rig.py``): number of pages, limits."""
    return load_beside("rig").Rig


@pytest.fixture(scope="session")
def simulator() -> Any:
    """The module ``simulator.py``."""
    return load_beside("simulator")
