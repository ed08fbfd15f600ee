"""When things happened to one request, in seconds of the monotonic clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestTiming:
    """Times of one request. A token's gap is measured from the token before it in the same choice."""

    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    queue_seconds: float | None = None
    adapter_load_seconds: float | None = None
    num_gaps: int = 0
    gap_seconds: float = 0.0
    _last_of: dict[int, float] = field(default_factory=dict)

    def token_came(self, index: int) -> tuple[bool, float | None]:
        """Notes an output of a choice; returns whether it is the request's first, and the choice's gap before it."""
        now = time.monotonic()
        first = self.first_token is None
        if first:
            self.first_token = now
        self.last_token = now
        before = self._last_of.get(index)
        self._last_of[index] = now
        if before is None:
            return first, None
        self.num_gaps += 1
        self.gap_seconds += now - before
        return first, now - before

    @property
    def time_to_first_token(self) -> float:
        return (self.first_token or time.monotonic()) - self.started

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def report(self, num_tokens: int) -> dict[str, float | None]:
        """The ``metrics`` object of an answer, in milliseconds; null where there was nothing to measure."""
        generation = (self.last_token or self.started) - (self.first_token or self.started)
        return {
            "queue_time_ms": _ms(self.queue_seconds),
            "time_to_first_token_ms": _ms(self.time_to_first_token),
            "generation_time_ms": _ms(generation),
            "mean_itl_ms": _ms(self.gap_seconds / self.num_gaps) if self.num_gaps else None,
            "tokens_per_second": round(num_tokens / self.elapsed, 3) if num_tokens else None,
            "adapter_load_ms": _ms(self.adapter_load_seconds),
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
