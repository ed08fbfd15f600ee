"""When things happened to one request, in seconds of the monotonic clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from loraplex.server.messages import TokenOutput
from loraplex.server.span_times import BeginTimes, EndTimes, FailTimes


@dataclass(slots=True)
class PromptTimes:
    """What the engine told of one prompt, and when the last of its choices so far was over."""

    began: BeginTimes | None = None
    cached_tokens: int = 0
    preempted: list[float] = field(default_factory=list)
    num_over: int = 0
    ended: float = 0.0

    def choice_over(self, over: EndTimes | None) -> None:
        """A choice is over, for the engine or, without its word, for the client."""
        self.num_over += 1
        self.ended = max(self.ended, time.monotonic() if over is None else over.ended)
        self.preempted += [] if over is None else over.preempted


@dataclass(frozen=True, slots=True)
class Failure:
    """Which command the engine failed, and when."""

    command: int
    times: FailTimes


@dataclass(slots=True)
class RequestTiming:
    """Times of one request. A token's gap is measured from the token before it in the same choice.

    Attributes:
        sent: when the engine was asked.
        ended: when the generation was over, however it ended.
        prompts: by the number of the command.
    """

    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    queue_seconds: float | None = None
    adapter_load_seconds: float | None = None
    num_gaps: int = 0
    gap_seconds: float = 0.0
    sent: float | None = None
    ended: float | None = None
    failed: Failure | None = None
    prompts: dict[int, PromptTimes] = field(default_factory=dict)
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

    def prompt(self, at: int) -> PromptTimes:
        """Of a command, by its number."""
        return self.prompts.setdefault(at, PromptTimes())

    def began(self, at: int, output: TokenOutput) -> None:
        """The first output of a command came."""
        prompt = self.prompt(at)
        prompt.began, prompt.cached_tokens = output.began, output.cached_tokens

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
