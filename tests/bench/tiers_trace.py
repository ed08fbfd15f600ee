"""Traces of requests: which adapter is asked for, when, with which prompt; and what their times come to."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        at: when it arrives, in seconds after the start of the trace.
        adapter: by its place among the adapters; None for the base.
        prompt: token ids.
        num_out: tokens of the answer.
    """

    at: float
    adapter: int | None
    prompt: list[int]
    num_out: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers: uniform from a fourth of ``prompt`` and ``out`` to seven fourths, or all equal."""

    prompt: int
    out: int
    vary: bool = False

    def draw(self, rng: random.Random, vocabulary: int) -> tuple[list[int], int]:
        prompt, out = (self._one(rng, mean) for mean in (self.prompt, self.out))
        return [rng.randrange(3, vocabulary) for _ in range(prompt)], out

    def _one(self, rng: random.Random, mean: int) -> int:
        return rng.randint(max(1, mean // 4), mean * 7 // 4) if self.vary else mean

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return (self.prompt + self.out) * 7 // 4 if self.vary else self.prompt + self.out


def popularity(count: int, exponent: float, seed: int) -> list[float]:
    """Weights of adapters by a power law, 0 being uniform; which adapters are popular is random."""
    weights = [(rank + 1) ** -exponent for rank in range(count)]
    random.Random(seed).shuffle(weights)
    return weights


def poisson_trace(
    rate: float, seconds: float, weights: Sequence[float], lengths: Lengths, vocabulary: int, seed: int
) -> list[Asked]:
    """Requests that arrive at random, ``rate`` a second, for adapters drawn by weight."""
    rng = random.Random(seed)
    cumulative, trace, now = list(accumulate(weights)), [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        (adapter,) = rng.choices(range(len(weights)), cum_weights=cumulative)
        prompt, out = lengths.draw(rng, vocabulary)
        trace.append(Asked(now, adapter, prompt, out))
    return trace


def crowd_trace(adapters: Sequence[int | None], lengths: Lengths, vocabulary: int, seed: int) -> list[Asked]:
    """Requests that are all there from the start, one for each of these adapters. Equal seeds give equal prompts."""
    rng = random.Random(seed)
    return [Asked(0.0, adapter, *lengths.draw(rng, vocabulary)) for adapter in adapters]


def in_slices(trace: Sequence[Asked], count: int) -> Iterator[Sequence[Asked]]:
    """So many pieces of about equal length."""
    size = -(-len(trace) // count)
    for start in range(0, len(trace), size):
        yield trace[start : start + size]


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
