"""No operator is left without the checks that torch asks of one."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import torch

import loraplex.kernels

LISTS_OPERATORS = re.compile(r"^OPERATORS\b", re.MULTILINE)


def registered() -> set[str]:
    """Operators of ours, when every module of the kernels has been imported."""
    for folder in loraplex.kernels.__path__:
        for path in Path(folder).glob("*.py"):
            importlib.import_module(f"loraplex.kernels.{path.stem}")
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("loraplex::").partition(".")[0] for name in names if name.startswith("loraplex::")}


def checked(path: Path) -> set[str]:
    """``OPERATORS`` of a file of tests: those that it gives to ``check_operator``, one and all."""
    spec = importlib.util.spec_from_file_location(f"operators_of_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.OPERATORS)


def test_every_operator_has_a_case_of_opcheck() -> None:
    files = [path for path in Path(__file__).parent.rglob("test_*.py") if LISTS_OPERATORS.search(path.read_text())]
    assert all("check_operator(" in path.read_text() for path in files)
    assert registered() == {name for path in files for name in checked(path)}
