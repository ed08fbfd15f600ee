"""When a read that failed is tried again: at once where the fault may pass, else after a pause that grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from loraplex.memory.adapter_errors import may_pass

Result = TypeVar("Result")

_PAUSES = (0.1, 0.4)
"""Seconds before the second and the third try of a read whose fault may pass."""


@dataclass(frozen=True, slots=True)
class BackOff:
    """Pauses between loads that fail one after another: ``first`` seconds, twice as long each time, at most
    ``longest``."""

    first: float = 1.0
    longest: float = 60.0

    def pause(self, failures: int) -> float:
        """Seconds until the next load after so many failures, 1 or more."""
        return min(self.first * 2.0 ** min(failures - 1, 60), self.longest)


def read_patiently(read: Callable[[], Result], sleep: Callable[[float], object]) -> Result:
    """What ``read`` returns, at the third try at the latest, as long as faults may pass (see ``may_pass``)."""
    for pause in _PAUSES:
        try:
            return read()
        except Exception as error:
            if not may_pass(error):
                raise
        sleep(pause)
    return read()
