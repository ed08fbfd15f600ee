"""A histogram that one thread fills: a bisection and two additions for each value, no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class Histogram:
    """Counts values by upper bound, bounds included."""

    __slots__ = ("_bounds", "_counts", "_names", "_sum", "count")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS) -> None:
        self._bounds = tuple(bounds)
        self._names = (*map(str, self._bounds), "+Inf")
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self.count = 0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        self.count += 1

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound -> how many values are not above it, the last one for all."""
        return list(zip(self._names, accumulate(self._counts), strict=True))
