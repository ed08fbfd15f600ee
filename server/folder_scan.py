"""What lies in a folder of adapters, by the looks of its files alone, and which changes to it have settled."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraplex.memory.adapter_config import CONFIG_NAME
from loraplex.memory.adapter_name import name_problem
from loraplex.memory.tensor_file import BIN_NAME, SAFETENSORS_NAME

Signature = tuple[tuple[int, int, int, int], ...]
"""Device, inode, size and time of change in ns, for each of an adapter's files; zeros for one that is not there.

Links are followed, so that one which points elsewhere now is a change.
"""

_ABSENT = (0, 0, 0, 0)
_NAMES = (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)
_GONE = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter folder."""

    path: str
    signature: Signature


Scan = Mapping[str, Found]
"""Adapter folders by name."""


def scan_folder(root: Path, before: Scan | None = None) -> Scan:
    """The adapters that ``find_adapters`` finds in a folder, with their signatures. Reads no file.

    Args:
        before: what was found last; an entry that cannot be looked at now stays as it is there, else is left out.

    Raises:
        OSError: the folder cannot be listed.
    """
    before = before or {}
    resolved = Path(os.path.realpath(root))
    alone = _found(str(root), before.get(resolved.name))
    if alone is not None:
        return {resolved.name: replace(alone, path=str(resolved))}
    with os.scandir(root) as entries:
        found = {entry.name: _found(entry.path, before.get(entry.name)) for entry in entries}
    return {name: one for name, one in found.items() if one is not None and name_problem(name) is None}


@dataclass(frozen=True, slots=True)
class Changes:
    """What to do about a folder: names to register or to register anew, and names to remove, with their paths."""

    changed: Mapping[str, Found]
    vanished: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.vanished)


@dataclass(slots=True)
class SettledChanges:
    """Compares scans with what was acted upon. A change counts once two scans in a row agree about it.

    Args:
        acted: what was registered.
    """

    acted: dict[str, Found]
    _before: dict[str, Found | None] = field(default_factory=dict)

    def of(self, scan: Scan) -> Changes:
        """Changes that have settled; each is told again with every scan until it was ``accept``-ed."""
        differing = {name: scan.get(name) for name in {**self.acted, **scan} if scan.get(name) != self.acted.get(name)}
        settled = {name: now for name, now in differing.items() if name in self._before and self._before[name] == now}
        self._before = differing
        return Changes(
            changed={name: now for name, now in settled.items() if now is not None},
            vanished={name: self.acted[name].path for name, now in settled.items() if now is None},
        )

    def accept(self, name: str, found: Found | None) -> None:
        """A change was acted upon, whatever came of it."""
        if found is None:
            self.acted.pop(name, None)
        else:
            self.acted[name] = found


def _found(folder: str, before: Found | None) -> Found | None:
    try:
        signature = _signature(folder)
    except OSError:
        return before
    return None if signature is None else Found(folder, signature)


def _signature(folder: str) -> Signature | None:
    """None for what is no adapter's folder."""
    config = _looks(f"{folder}/{_NAMES[0]}")
    if config == _ABSENT:
        return None
    return (config, *(_looks(f"{folder}/{name}") for name in _NAMES[1:]))


def _looks(path: str) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 - ten thousand Path objects would take longer than the calls
    except _GONE:
        return _ABSENT
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else _ABSENT
