"""Time to the first token where the pool holds a quarter of the adapters in use, beside a pool that holds them all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiers_line import Line, Report, Turn, start_lines
from tiers_model import SIZES, write_adapters, write_base
from tiers_trace import Asked, Lengths, crowd_trace, percentile, poisson_trace, popularity

from loraplex.server.engine_config import EngineConfig

ALL, QUARTER, LRU, HALF = "all", "a quarter", "a quarter, LRU", "a quarter, host of half"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarterRun:
    """What to measure.

    Attributes:
        root: where the base and its adapters are written.
        base: one of ``SIZES``.
        adapters: in use.
        lengths: of prompts and answers.
        load: share of what the pool of all adapters carries at ``in_flight`` requests at once.
        seconds: of the trace in each turn.
        rounds: turns of each line.
        exponents: of the power law by which adapters are asked for.
        kv_pages: of each pool, beside adapters.
        threads: of operators; None is the engine's default.
        inline: see ``start_lines``.
    """

    root: Path
    base: str = "0.37b"
    adapters: int = 32
    rank: int = 16
    lengths: Lengths = field(default_factory=lambda: Lengths(32, 4))
    load: float = 0.55
    in_flight: int = 8
    seconds: float = 20.0
    rounds: int = 6
    exponents: tuple[float, ...] = (1.0, 0.0)
    kv_pages: int = 256
    threads: int | None = None
    inline: bool = False


@dataclass(slots=True)
class _Gathered:
    """Of a line under one popularity, all rounds together."""

    first: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    idle_seconds: float = 0.0
    others_cpu_seconds: float = 0.0
    failures: int = 0

    def add(self, report: Report) -> None:
        self.first += report.first.values()
        self.counts.update(report.counts)
        self.seconds += report.seconds
        self.idle_seconds += report.idle_seconds
        self.others_cpu_seconds += report.others_cpu_seconds
        self.failures += len(report.failures)

    def figures(self) -> dict[str, Any]:
        p50, p90, p99 = (percentile(self.first, share) for share in (0.5, 0.9, 0.99))
        return {
            "requests": len(self.first),
            "failures": self.failures,
            "p50_s": p50,
            "p90_s": p90,
            "p99_s": p99,
            "p99_over_p50": p99 / p50,
            "busy": 1 - self.idle_seconds / self.seconds,
            "others_cores": self.others_cpu_seconds / self.seconds,
            "counts": dict(sorted(self.counts.items())),
        }


def configs(run: QuarterRun, model: Path) -> dict[str, EngineConfig]:
    """The lines, by name: all have the same room for K/V."""
    sizes = SIZES[run.base]
    page_bytes, pages = sizes.page_shape().page_bytes, sizes.adapter_pages(run.rank)
    images = sizes.adapter_bytes(run.rank)

    def config(held: int, host: int, eviction: str = "value") -> EngineConfig:
        return EngineConfig(
            model=str(model),
            dtype="float32",  # of the page's bytes above
            pool_bytes=(held * pages + run.kv_pages) * page_bytes,
            host_adapter_bytes=host * images,
            eviction="lru" if eviction == "lru" else "value",
            threads=run.threads,
        )

    few, every = max(1, run.adapters // 4), run.adapters
    return {
        ALL: config(every, every),
        QUARTER: config(few, every),
        LRU: config(few, every, "lru"),
        HALF: config(few, every // 2),
    }


def measure(run: QuarterRun) -> dict[str, Any]:
    """The record."""
    model = write_base(run.root, run.base)
    folder = write_adapters(run.root, run.base, run.rank, run.adapters)
    paths = sorted(str(path) for path in folder.iterdir())
    lines = start_lines(configs(run, model), paths, inline=run.inline)
    try:
        _warm(run, lines)
        check(run, lines)
        record: dict[str, Any] = {"adapters": run.adapters, "capacity": capacity(run, lines[ALL])}
        rate = run.load * record["capacity"]["adapters_per_s"]
        record |= {"rate_per_s": rate, "load": run.load}
        record["popularity"] = {f"zipf {s}" if s else "uniform": _traces(run, lines, s, rate) for s in run.exponents}
    finally:
        for line in lines.values():
            line.close()
    return record


def _warm(run: QuarterRun, lines: Mapping[str, Line]) -> None:
    """Read every adapter, and fill the pools."""
    everyone = range(run.adapters)
    for name, line in lines.items():
        line.run(Turn(prefetch=everyone))
        line.run(Turn(prefetch=everyone if name == ALL else everyone[: max(1, run.adapters // 4)], tier="pool"))


def check(run: QuarterRun, lines: Mapping[str, Line]) -> None:
    """The same requests, one after another, have the same answers wherever the adapters come from. AssertionError if
    not."""
    chosen: list[int | None] = [None, *random.Random(5).sample(range(run.adapters), min(6, run.adapters))]
    trace = crowd_trace(chosen, Lengths(24, 6), SIZES[run.base].vocabulary, seed=5)
    answers = {name: line.run(Turn(trace, in_flight=1)).answers for name, line in lines.items()}
    assert all(len(found) == len(trace) for found in answers.values()), "a request has no answer"
    assert all(found == answers[ALL] for found in answers.values()), "answers depend on where adapters come from"


def capacity(run: QuarterRun, line: Line) -> dict[str, float]:
    """Requests a second with some always open: of the base alone, and each under another adapter."""
    vocabulary, count = SIZES[run.base].vocabulary, 4 * run.in_flight
    found: dict[str, float] = {}
    # The first one is not counted: every shape of step is run once.
    for name, adapters in (("", [None] * count), ("base_per_s", [None] * count), ("adapters_per_s", range(count))):
        asked = [None if adapter is None else adapter % run.adapters for adapter in adapters]
        trace = crowd_trace(asked, run.lengths, vocabulary, seed=len(found))
        found[name] = count / line.run(Turn(trace, in_flight=run.in_flight)).seconds
        print(f"capacity {name}: {found[name]:.3f}", flush=True)
    return {name: rate for name, rate in found.items() if name}


def _traces(run: QuarterRun, lines: Mapping[str, Line], exponent: float, rate: float) -> dict[str, Any]:
    gathered = {name: _Gathered() for name in lines}
    weights = popularity(run.adapters, exponent, seed=11)
    for turn in range(run.rounds):
        seed = hash((exponent, turn))  # else prompts come again, and their K/V may still be there
        trace = poisson_trace(rate, run.seconds, weights, run.lengths, SIZES[run.base].vocabulary, seed)
        for name in _rotated(list(lines), turn):
            report = lines[name].run(Turn(trace))
            assert len(report.first) + len(report.failures) == len(trace), "a request has no end"
            gathered[name].add(report)
            _show(f"{exponent} {turn} {name}", report, trace)
    found = {name: line.figures() for name, line in gathered.items()}
    for line in found.values():
        line["median_over_all"] = line["p50_s"] / found[ALL]["p50_s"]
    return found


def _rotated(names: list[str], by: int) -> list[str]:
    at = by % len(names)
    return names[at:] + names[:at]


def _show(what: str, report: Report, trace: Sequence[Asked]) -> None:
    first = list(report.first.values())
    shown = "  ".join(f"p{100 * share:.0f} {percentile(first, share):.3f} s" for share in (0.5, 0.9, 0.99))
    others = report.others_cpu_seconds / report.seconds
    print(f"{what:32s} {len(trace)} requests  {shown}  others took {others:.2f} cores", flush=True)


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The record as a table."""
    rows = [
        "| asked for | pool | p50 s | p90 s | p99 s | p50 / all's | p99 / p50 | pool hits | host hits | read | busy |"
    ]
    rows.append("|---" * 11 + "|")
    for popularity_name, lines in record["popularity"].items():
        for name, line in lines.items():
            counts = line["counts"]
            times = " | ".join(f"{line[key]:.3f}" for key in ("p50_s", "p90_s", "p99_s"))
            ratios = f"{line['median_over_all']:.2f} | {line['p99_over_p50']:.2f}"
            hits = " | ".join(_share(counts, tier) for tier in ("pool", "host"))
            rows.append(
                f"| {popularity_name} | {name} | {times} | {ratios} | {hits} | {counts.get('disk to host', 0):.0f} |"
                f" {line['busy']:.2f} |"
            )
    return rows


def _share(counts: Mapping[str, float], tier: str) -> str:
    hits, misses = counts.get(f"{tier} hit", 0), counts.get(f"{tier} miss", 0)
    return f"{100 * hits / (hits + misses):.0f} %" if hits + misses else "-"
