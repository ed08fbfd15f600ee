"""How long adapters took to read, and so about how long they would take again."""

from __future__ import annotations

from collections import OrderedDict, deque

_MAX_KNOWN = 200_000
"""So many contents' times are remembered; beyond them, those read longest ago are forgotten."""

_MAX_RECENT = 10_000
_KEPT = 0.9
"""Share of the running sums that a read leaves: they are over about the last ten."""

_SHORTEST = 1e-6
_FIRST_GUESS = 0.01
"""Seconds, while nothing has been read."""


class ReadTimes:
    """Seconds by content. Not thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, float] = OrderedDict()
        self._recent: deque[float] = deque(maxlen=_MAX_RECENT)
        self._reads = self._seconds = self._num_bytes = 0.0

    def note(self, identity: str, num_bytes: int, seconds: float) -> None:
        """An adapter whose image has so many bytes has been read."""
        self._known[identity] = max(seconds, _SHORTEST)
        self._known.move_to_end(identity)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        self._recent.append(seconds)
        self._reads = _KEPT * self._reads + 1
        self._seconds = _KEPT * self._seconds + seconds
        self._num_bytes = _KEPT * self._num_bytes + num_bytes

    def seconds_of(self, identity: str, num_bytes: int | None = None) -> float:
        """What its last read took; else what so many bytes, or an adapter of any size, took of late. Above 0."""
        known = self._known.get(identity)
        if known is not None:
            return known
        if not self._reads:
            return _FIRST_GUESS
        share = 1 / self._reads if num_bytes is None else num_bytes / max(self._num_bytes, 1)
        return max(self._seconds * share, _SHORTEST)

    def take_recent(self) -> list[float]:
        """The seconds of each read since the last call, the latest ten thousand at most."""
        recent = list(self._recent)
        self._recent.clear()
        return recent
