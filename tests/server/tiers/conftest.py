"""The tiers under an engine without a model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def machine() -> ModuleType:
    """The module ``machine.py``, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location("tests_tiers_machine", Path(__file__).with_name("machine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_tiers(machine: ModuleType) -> Iterator[Callable[..., Any]]:
    """A machine to be driven by hand: pages of the pool, units of the host."""
    made: list[Any] = []

    def make(pages: int = 40, units: int = 14, *, by_value: bool = True) -> Any:
        tiers = machine.TiersMachine()
        tiers.start(pages=pages, units=units, by_value=by_value)
        made.append(tiers)
        return tiers

    yield make
    for tiers in made:
        tiers.files.gate.set()
        tiers.engine.close()
