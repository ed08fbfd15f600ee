"""The one place where commands import on demand.

A command line must answer ``version``, ``--help`` and a wrong flag at once, but torch and transformers take seconds to
import. So a command is split in two: its declaration (flags and help, in a light module), and its work (in a module
with all the imports that it needs, at the top as everywhere). The declaration ends in
``run_lazily("module:function", ...)``.
"""

from __future__ import annotations

import importlib
from typing import Any


def run_lazily(target: str, /, *args: Any, **kwargs: Any) -> None:
    """Import ``target``, written ``module:function``, and call it."""
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(*args, **kwargs)
