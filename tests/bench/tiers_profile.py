"""What this engine's functions cost in one thread, most expensive first."""

from __future__ import annotations

import contextlib
import cProfile
import pstats
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_ROOMS = frozenset({"server", "memory", "kernels"})


@dataclass(frozen=True, slots=True)
class Profiled:
    """A function of the rooms: how often it was called, and the seconds in it, without and with what it calls."""

    name: str
    calls: int
    own_seconds: float
    seconds: float


@contextlib.contextmanager
def profiled(wanted: bool) -> Iterator[list[Profiled]]:
    """Counts the calls of the calling thread inside the context; the list is filled at its end, if that is wanted."""
    found: list[Profiled] = []
    if not wanted:
        yield found
        return
    with cProfile.Profile() as profile:
        yield found
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, line, function), (_, calls, own, whole, _) in stats.items():
        place = Path(file)
        if place.is_relative_to(_ROOT) and place.parent.name in _ROOMS:
            found.append(Profiled(f"{place.relative_to(_ROOT)}:{line} {function}", calls, own, whole))
    found.sort(key=lambda one: -one.seconds)
