"""How often things have been wanted lately, on a scale on which they need not be compared again as time goes by.

The weight of a thing is a sum over its arrivals, each counting ``exp(-age / memory_seconds)``; divided by
``memory_seconds`` that is its arrival rate, and in proportion to the chance that it is wanted within a moment from now.
All weights shrink by the same factor as time goes by, so *absolute* weights, the sum of ``exp(time / memory_seconds)``,
have the same order and change only when something arrives. They are kept as logarithms, which never overflow.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from heapq import nlargest
from operator import itemgetter

NEVER = float("-inf")
"""Log-weight of what has never been wanted."""


class ArrivalRates:
    """Weights by key. One thread notes arrivals; others may ask for weights meanwhile.

    Args:
        memory_seconds: after so long an arrival counts 1/e. Short against the time for which things lie idle before
            they are put out, or what was wanted in a burst outstays what is wanted now.
        max_keys: so many keys are remembered; beyond them, those whose last arrival is longest ago are forgotten.
        clock: monotonic seconds.
    """

    def __init__(
        self, memory_seconds: float = 30.0, *, max_keys: int = 200_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._memory_seconds = memory_seconds
        self._max_keys = max_keys
        self._clock = clock
        self._started = clock()
        self._log_weights: OrderedDict[Hashable, float] = OrderedDict()

    def note(self, key: Hashable) -> None:
        """Something has been wanted once more."""
        self._log_weights[key] = self.one_more(self._log_weights.get(key, NEVER))
        self._log_weights.move_to_end(key)
        if len(self._log_weights) > self._max_keys:
            self._log_weights.popitem(last=False)

    def log_weight(self, key: Hashable) -> float:
        """Logarithm of the absolute weight; ``NEVER`` for what is not known."""
        return self._log_weights.get(key, NEVER)

    def one_more(self, log_weight: float) -> float:
        """The absolute weight, as a logarithm, of what has this one and has just been wanted once more."""
        now = self._now()
        high, low = max(log_weight, now), min(log_weight, now)
        return high if low == NEVER else high + math.log1p(math.exp(low - high))

    def rate(self, key: Hashable) -> float:
        """Arrivals a second, about now."""
        log_weight = self.log_weight(key)
        return 0.0 if log_weight == NEVER else math.exp(log_weight - self._now()) / self._memory_seconds

    def most_wanted(self, limit: int) -> list[Hashable]:
        """The keys with the largest weights, the largest first. Costs time in proportion to all that are known."""
        known = list(self._log_weights.items())  # at once: another thread may note arrivals meanwhile
        return [key for key, _ in nlargest(limit, known, key=itemgetter(1))]

    def _now(self) -> float:
        return (self._clock() - self._started) / self._memory_seconds


def worth_of(seconds: float, log_weight: float, size: int) -> float:
    """What keeping something is worth for the room that it takes: log(seconds x weight / size).

    Args:
        seconds: that it takes to make it again; a nanosecond at least.
        log_weight: how often it is wanted, as an ``ArrivalRates`` has it.
        size: pages or bytes that it takes.
    """
    return log_weight + math.log(max(seconds, 1e-9) / size)
