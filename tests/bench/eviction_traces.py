"""Which order of eviction loses least time, on made traces; prints a table over how long arrivals are remembered.

An adapter that is wanted and not there costs its rebuild time. Times are simulated, so the figures are the same on any
machine. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from loraplex.memory.arrival_rates import ArrivalRates, worth_of
from loraplex.memory.eviction_order import EvictionOrder, LruOrder, ValueOrder

RANKS = (8, 8, 16, 16, 16, 32, 64, 128)
PAGES_PER_RANK = 2.5  # all linears of an 8 B shape
HOST_BYTES_PER_SECOND = 10e9
DISK_BYTES_PER_SECOND = 0.5e9
PAGE_BYTES = 32 * 64 * 1024
COMPUTE_SECONDS = 2e-3  # of a cached page

Trace = list[tuple[float, int]]
"""(second, thing wanted)."""


@dataclass(frozen=True, slots=True)
class Things:
    """Pages of each thing, and seconds to have it again."""

    pages: list[int]
    seconds: list[float]


def mixed_things(count: int, seed: int = 0) -> Things:
    """Adapters of mixed ranks, a third of which have no host copy, and a cached prefix for every other one of them."""
    rng = random.Random(seed)
    pages, seconds = [], []
    for thing in range(count):
        if thing % 3 == 2:
            pages.append(rng.choice((8, 16, 32, 64)))
            seconds.append(pages[-1] * COMPUTE_SECONDS)
        else:
            pages.append(round(PAGES_PER_RANK * rng.choice(RANKS)))
            speed = DISK_BYTES_PER_SECOND if rng.random() < 1 / 3 else HOST_BYTES_PER_SECOND
            seconds.append(1e-3 + pages[-1] * PAGE_BYTES / speed)
    return Things(pages, seconds)


def _zipf(count: int, exponent: float = 1.0) -> list[float]:
    return list(accumulate((at + 1) ** -exponent for at in range(count)))


def _times(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    now = rng.expovariate(rate)
    while now < seconds:
        yield now
        now += rng.expovariate(rate)


def stationary(count: int, rate: float, seconds: float, seed: int = 1) -> Trace:
    """Zipf popularity that stays."""
    rng, weights = random.Random(seed), _zipf(count)
    places = rng.sample(range(count), count)
    return [(now, places[rng.choices(range(count), cum_weights=weights)[0]]) for now in _times(rng, rate, seconds)]


def drifting(count: int, rate: float, seconds: float, seed: int = 1, half_life: float = 1800.0) -> Trace:
    """Zipf popularity in which, after ``half_life``, half of the things have another place."""
    rng, weights = random.Random(seed), _zipf(count)
    places = rng.sample(range(count), count)
    trace, due = [], 0.0
    for now in _times(rng, rate, seconds):
        while due < now:  # a swap moves two
            one, other = rng.randrange(count), rng.randrange(count)
            places[one], places[other] = places[other], places[one]
            due += half_life / (0.35 * count)
        trace.append((now, places[rng.choices(range(count), cum_weights=weights)[0]]))
    return trace


def bursts(count: int, rate: float, seconds: float, seed: int = 1, length: int = 20, gap: float = 5.0) -> Trace:
    """Conversations: each wants one thing ``length`` times, about ``gap`` seconds apart, and then no more of it."""
    rng = random.Random(seed)
    trace = []
    for start in _times(rng, rate / length, seconds):
        thing, now = rng.randrange(count), start
        for _ in range(length):
            trace.append((now, thing))
            now += rng.expovariate(1 / gap)
    return sorted(trace)


def moving(count: int, rate: float, seconds: float, seed: int = 1, stay: float = 300.0, width: float = 0.1) -> Trace:
    """Recency and nothing else: all of a window of things are wanted alike, and the window moves on for good."""
    rng = random.Random(seed)
    window = max(1, int(width * count))
    return [(now, (int(now / stay * window) + rng.randrange(window)) % count) for now in _times(rng, rate, seconds)]


def looping(count: int, rate: float, seconds: float, seed: int = 1) -> Trace:
    """Everything in turn, again and again."""
    return [(now, at % count) for at, now in enumerate(_times(random.Random(seed), rate, seconds))]


TRACES = {f.__name__: f for f in (stationary, drifting, bursts, moving, looping)}


class _Pages:
    """A cache of things in an order."""

    def __init__(self, things: Things, num_pages: int, order: EvictionOrder, rates: ArrivalRates) -> None:
        self._things, self._order, self._rates = things, order, rates
        self._free = num_pages

    def put_out(self, key: Hashable) -> None:
        assert isinstance(key, int)
        self._free += self._things.pages[key]

    def want(self, thing: int) -> float:
        """Returns the seconds that it costs."""
        self._rates.note(thing)
        pages, seconds = self._things.pages[thing], self._things.seconds[thing]
        here = thing in self._order
        if here:
            self._order.discard(thing)
        else:
            while self._free < pages:
                self._order.put_out_first()
            self._free -= pages
        self._order.add(thing, pages, self, worth_of(seconds, self._rates.log_weight(thing), pages))
        return 0.0 if here else seconds


def seconds_lost(trace: Trace, things: Things, share: float, memory_seconds: float | None) -> float:
    """Rebuild time over the second half of a trace.

    Args:
        trace: what is wanted when.
        things: their sizes and costs.
        share: of all pages, how many the pool has.
        memory_seconds: of ``ArrivalRates`` under ``ValueOrder``; None for ``LruOrder``.
    """
    now = 0.0
    rates = ArrivalRates(600.0 if memory_seconds is None else memory_seconds, clock=lambda: now)
    order: EvictionOrder = LruOrder() if memory_seconds is None else ValueOrder()
    cache = _Pages(things, max(max(things.pages), int(share * sum(things.pages))), order, rates)
    middle = trace[-1][0] / 2
    lost = 0.0
    for now, thing in trace:
        cost = cache.want(thing)
        lost += cost if now > middle else 0.0
    return lost


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events", type=int, default=20_000)
    arguments.add_argument("--things", type=int, nargs="*", default=[300, 3000])
    arguments.add_argument("--rates", type=float, nargs="*", default=[2.0, 10.0, 50.0])
    arguments.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25])
    arguments.add_argument("--memory", type=float, nargs="*", default=[15, 30, 60, 120, 300, 600, 3600])
    options = arguments.parse_args()
    record = []
    print("time lost under ValueOrder over time lost under LruOrder, by seconds of memory")
    print(f"{'trace':>12} things  rate share" + "".join(f"{memory:>8.0f}" for memory in options.memory))
    for count in options.things:
        things = mixed_things(count)
        for rate in options.rates:
            for name, make in TRACES.items():
                trace = make(count, rate, options.events / rate)
                for share in options.shares:
                    lru = seconds_lost(trace, things, share, None)
                    ratios = [seconds_lost(trace, things, share, memory) / lru for memory in options.memory]
                    print(f"{name:>12} {count:6} {rate:5.1f} {share:5.2f}" + "".join(f"{r:8.2f}" for r in ratios))
                    found = dict(zip(options.memory, ratios))
                    record.append({"trace": name, "things": count, "rate": rate, "share": share, "ratios": found})
    print(json.dumps(record))


if __name__ == "__main__":
    main()
