"""The little of msgspec, structlog and psutil that the engine needs, for machines that lack them.

Benchmarks run in process: nothing is encoded, and logs go to the standard library's. Where a package is installed it is
used; a stand-in takes its name only if the import fails.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import logging
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, dataclass_transform

_DATACLASS_OPTIONS = ("frozen", "kw_only")


class _Struct:
    """``msgspec.Struct``: keyword options of the class statement, mutable defaults copied for each instance."""

    _options: ClassVar[dict[str, bool]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        chosen = cls._options | {name: bool(options[name]) for name in _DATACLASS_OPTIONS if name in options}
        cls._options = chosen
        for name in inspect.get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, (list, dict, set)):
                setattr(cls, name, dataclasses.field(default_factory=_copier(default)))
        dataclasses.dataclass(**chosen)(cls)


def _copier(default: Any) -> Any:
    return lambda: copy.copy(default)


def _msgspec() -> ModuleType:
    module = ModuleType("msgspec")
    struct = dataclass_transform(field_specifiers=())(_Struct)
    contents = {"Struct": struct, "structs": SimpleNamespace(replace=dataclasses.replace)}
    vars(module).update(contents)
    return module


class _Logger:
    """A structlog logger as far as the engine calls it: an event with named values."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def exception(self, event: str, **values: Any) -> None:
        self._log.exception("%s %s", event, values or "")

    def __getattr__(self, level: str) -> Any:
        log = getattr(self._log, level)
        return lambda event, **values: log("%s %s", event, values or "")


def _structlog() -> ModuleType:
    module = ModuleType("structlog")
    contents = {"get_logger": lambda name="loraplex": _Logger(name)}
    vars(module).update(contents)
    return module


def _psutil() -> ModuleType:
    module = ModuleType("psutil")

    def virtual_memory() -> SimpleNamespace:
        return SimpleNamespace(available=os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    contents = {"virtual_memory": virtual_memory}
    vars(module).update(contents)
    return module


_MADE = {"msgspec": _msgspec, "structlog": _structlog, "psutil": _psutil}


def install() -> list[str]:
    """Put stand-ins in the place of what cannot be imported; returns their names."""
    missing = []
    for name, make in _MADE.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = make()
            missing.append(name)
    return missing
