"""The one place that imports on demand.

A command line must answer ``version``, ``--help`` and a wrong flag at once, but torch and transformers take seconds to
import. So a command is split in two: its declaration (flags and help, in a light module), and its work (in a module
with all the imports that it needs, at the top as everywhere). The declaration ends in
``run_lazily("module:function", ...)``. ``serve.py`` likewise starts the engine process before it imports its own half.
"""

from __future__ import annotations

import importlib
from typing import Any


def load(target: str) -> Any:
    """Import what ``module:name`` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def run_lazily(target: str, /, *args: Any, **kwargs: Any) -> None:
    """Import the function ``module:function`` and call it."""
    load(target)(*args, **kwargs)
