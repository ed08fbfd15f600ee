"""Makes ``loraplex`` importable from a plain copy of the repository, where nothing is installed.

The rooms are folders in the repository's root; ``loraplex`` becomes a namespace whose path is that root. This has to be
imported before anything of ``loraplex``.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import standins

ROOT = Path(__file__).resolve().parents[3]


def _make_importable() -> list[str]:
    """Returns the packages that stand-ins take the place of."""
    missing = standins.install()
    if "loraplex" not in sys.modules:
        spec = ModuleSpec("loraplex", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules["loraplex"] = module_from_spec(spec)
    if "psutil" in missing:
        # transformers looks whether there is a psutil, and would find this one wanting.
        importlib.import_module("loraplex.memory.budget")
        del sys.modules["psutil"]
    return missing


STANDINS = _make_importable()
"""Packages that stand-ins take the place of."""
