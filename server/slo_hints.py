"""What clients and gateways hope for: ``x-slo-ttft-ms`` and ``x-slo-tpot-ms``, the time to the first token and the mean
time between tokens. The first decides who of those that wait comes in first (``slo_order``); both are counted as met or
missed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraplex.server.exposition import Labels, LiveCounts
from loraplex.server.request_timing import RequestTiming

OUTCOMES = tuple((slo, outcome) for slo in ("ttft", "tpot") for outcome in ("met", "missed"))


@dataclass(frozen=True, slots=True)
class SloHints:
    """Targets in seconds; None is none."""

    first_token: float | None = None
    per_token: float | None = None


NO_HINTS = SloHints()


def slo_hints(headers: Mapping[str, str]) -> SloHints:
    """The hints of a request. One that is no positive number of milliseconds is none."""
    return SloHints(_seconds(headers.get("x-slo-ttft-ms")), _seconds(headers.get("x-slo-tpot-ms")))


class SloCounts(LiveCounts):
    """Requests with hints, by whether they were met."""

    def __init__(self) -> None:
        text = "Requests that came with a target in x-slo-ttft-ms or x-slo-tpot-ms, by whether it was met."
        super().__init__("loraplex_slo_requests", text, "counter", ("slo", "outcome"))
        self._values: Counter[Labels] = Counter(dict.fromkeys(OUTCOMES, 0))

    def values(self) -> Iterable[tuple[Labels, float]]:
        return self._values.items()

    def count(self, hints: SloHints, timing: RequestTiming, outcome: str) -> None:
        """A request with these hints ended.

        One that failed has missed them. One that its client gave up has missed the first if that was overdue, and says
        nothing of what it did not stay for.
        """
        if hints.first_token is not None and (timing.first_token is not None or outcome != "aborted"):
            self._note("ttft", outcome != "failed" and timing.time_to_first_token <= hints.first_token)
        elif hints.first_token is not None and timing.elapsed > hints.first_token:
            self._note("ttft", met=False)
        if hints.per_token is not None and (timing.num_gaps or outcome == "failed"):
            mean = timing.gap_seconds / timing.num_gaps if timing.num_gaps else math.inf
            self._note("tpot", outcome != "failed" and mean <= hints.per_token)

    def _note(self, slo: str, met: bool) -> None:
        self._values[slo, "met" if met else "missed"] += 1


def _seconds(milliseconds: str | None) -> float | None:
    if milliseconds is None:
        return None
    try:
        seconds = float(milliseconds) / 1000
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
