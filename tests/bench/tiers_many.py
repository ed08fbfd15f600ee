"""Ten thousand adapters, each asked for, beside the same trace over a hundred; memory, and what registering costs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tiers_line import Line, Report, Turn, start_lines
from tiers_model import SIZES, write_adapters, write_base
from tiers_registry import registry_costs
from tiers_trace import Asked, Lengths, crowd_trace, in_slices

from loraplex.server.engine_config import EngineConfig

FEW, MANY = "few", "many"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyRun:
    """What to measure.

    Attributes:
        root: where the base and its adapters are written.
        base: one of ``SIZES``.
        adapters, few: of the two traces.
        requests: at least one for each adapter; the others are for adapters drawn at random.
        lengths: of prompts and answers.
        in_flight: requests that are open at any time.
        slices: the traces take turns in so many pieces.
        pool_share, host_share: budgets, as shares of all images together.
        threads: of operators; None is the engine's default.
        with_profile: have the step loop's functions timed at the end.
        inline: see ``start_lines``.
    """

    root: Path
    base: str = "small"
    adapters: int = 10_000
    few: int = 100
    requests: int = 10_000
    rank: int = 8
    lengths: Lengths = field(default_factory=lambda: Lengths(64, 32, vary=True))
    in_flight: int = 64
    slices: int = 10
    pool_share: float = 0.05
    host_share: float = 0.25
    threads: int | None = None
    loader_threads: int | None = None
    with_profile: bool = False
    inline: bool = False


def config_of(run: ManyRun, model: Path) -> EngineConfig:
    """Of both lines: budgets for a share of the images, and the pool has room for the K/V of what is open besides."""
    sizes = SIZES[run.base]
    shape = sizes.page_shape()
    kv_pages = run.in_flight * (1 + -(-run.lengths.longest // shape.page_tokens))
    # The hundred fit both, else their trace would not be one without loads.
    held = max(run.few, int(run.pool_share * run.adapters))
    return EngineConfig(
        model=str(model),
        dtype="float32",  # of the bytes above
        pool_bytes=(held * sizes.adapter_pages(run.rank) + kv_pages) * shape.page_bytes,
        host_adapter_bytes=max(run.few, int(run.host_share * run.adapters)) * sizes.adapter_bytes(run.rank),
        threads=run.threads,
        max_model_len=max(64, run.lengths.longest),
        loader_threads=run.loader_threads,
    )


def measure(run: ManyRun) -> dict[str, Any]:
    """The record."""
    model = write_base(run.root, run.base)
    folder = write_adapters(run.root, run.base, run.rank, run.adapters)
    paths = sorted(str(path) for path in folder.iterdir())
    record: dict[str, Any] = {"adapters": run.adapters, "registry": registry_costs(folder, model, inline=run.inline)}
    config = config_of(run, model)
    lines = start_lines({FEW: config, MANY: config}, paths, inline=run.inline)
    try:
        _warm(run, lines)
        check(run, lines)
        record["cold_load"] = cold_loads(run, lines[MANY])
        record["trace"] = _traces(run, lines)
        record["memory"] = _memory(run, config, lines[MANY], record["trace"]["rss_at_end"])
        if run.with_profile:
            record["profile"] = _profile(run, lines)
    finally:
        for line in lines.values():
            line.close()
    return record


def _warm(run: ManyRun, lines: Mapping[str, Line]) -> None:
    """The few come into both pools, and every shape of step is run once."""
    trace = crowd_trace(_drawn(run, FEW, 2 * run.in_flight, 3), run.lengths, SIZES[run.base].vocabulary, seed=3)
    for line in lines.values():
        line.run(Turn(trace, run.in_flight, prefetch=range(run.few), tier="pool"))


def check(run: ManyRun, lines: Mapping[str, Line]) -> None:
    """The same requests, one after another, have the same answers on both. AssertionError if not."""
    trace = crowd_trace([None, *range(min(6, run.few))], Lengths(24, 6), SIZES[run.base].vocabulary, seed=5)
    few, many = (lines[name].run(Turn(trace, in_flight=1)).answers for name in (FEW, MANY))
    assert few == many, "equal requests have different answers"
    assert len(few) == len(trace), "a request has no answer"


def cold_loads(run: ManyRun, line: Line, count: int = 200) -> dict[str, float]:
    """Reading adapters while nothing else runs: milliseconds each of loader threads, and of their processors' time."""
    chosen = range(run.few, min(run.adapters, run.few + count))
    if not chosen:
        return {}
    report = line.run(Turn(prefetch=chosen))
    return {
        "adapters": len(chosen),
        "wall_ms": 1e3 * report.prefetch_seconds / len(chosen),
        "loaders_cpu_ms": 1e3 * report.prefetch_cpu_seconds.get("loaders", 0.0) / len(chosen),
    }


def _drawn(run: ManyRun, name: str, count: int, seed: int) -> list[int | None]:
    """Adapters of so many requests: of the many, each once before any comes twice, in random order."""
    rng = random.Random(seed)
    if name == FEW:
        return [rng.randrange(run.few) for _ in range(count)]
    drawn: list[int | None] = [*rng.sample(range(run.adapters), min(run.adapters, count))]
    return drawn + [rng.randrange(run.adapters) for _ in range(count - len(drawn))]


def _traces(run: ManyRun, lines: Mapping[str, Line]) -> dict[str, Any]:
    """Both traces have the same prompts and lengths; the lines take turns, slice by slice."""
    vocabulary = SIZES[run.base].vocabulary
    slices = {
        name: list(
            in_slices(crowd_trace(_drawn(run, name, run.requests, 1), run.lengths, vocabulary, seed=1), run.slices)
        )
        for name in lines
    }
    reports: dict[str, list[Report]] = {name: [] for name in lines}
    for at in range(len(slices[FEW])):
        for name in (FEW, MANY) if at % 2 == 0 else (MANY, FEW):
            report = lines[name].run(Turn(slices[name][at], run.in_flight))
            _check_complete(report, slices[name][at])
            reports[name].append(report)
        few, many = (reports[name][-1] for name in (FEW, MANY))
        print(
            f"slice {at}: {_rate(few):.0f} and {_rate(many):.0f} tokens/s: {_rate(many) / _rate(few):.3f}", flush=True
        )
    ratios = [_rate(many) / _rate(few) for few, many in zip(reports[FEW], reports[MANY])]
    touched = {one.adapter for part in slices[MANY] for one in part}
    return {
        "requests": run.requests,
        "touched": len(touched),
        "ratio": _total_rate(reports[MANY]) / _total_rate(reports[FEW]),
        "median_slice_ratio": median(ratios),
        "slice_ratios": ratios,
        "lines": {name: _summary(found) for name, found in reports.items()},
        "rss_at_end": reports[MANY][-1].rss,
    }


def _check_complete(report: Report, trace: object) -> None:
    assert not report.failures, f"requests failed: {report.failures[:3]}"
    assert isinstance(trace, list)
    assert len(report.first) == len(trace), "a request has no answer"
    assert report.tokens == sum(one.num_out for one in trace if isinstance(one, Asked))


def _rate(report: Report) -> float:
    return report.tokens / report.seconds


def _total_rate(reports: list[Report]) -> float:
    return sum(report.tokens for report in reports) / sum(report.seconds for report in reports)


def _summary(reports: list[Report]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    for report in reports:
        counts.update(report.counts)
        cpu.update(report.cpu_seconds)
    seconds = sum(report.seconds for report in reports)
    first = [one for report in reports for one in report.first.values()]
    return {
        "tokens_per_s": _total_rate(reports),
        "requests_per_s": len(first) / seconds,
        "seconds": seconds,
        "idle_share": sum(report.idle_seconds for report in reports) / seconds,
        "step_ms": 1e3 * seconds / counts["steps"],
        "first_median_s": median(first),
        "cpu_seconds": dict(cpu),
        "others_cores": sum(report.others_cpu_seconds for report in reports) / seconds,
        "counts": dict(sorted(counts.items())),
    }


def _memory(run: ManyRun, config: EngineConfig, line: Line, rss: int) -> dict[str, Any]:
    """Resident bytes beside the budgets; what is left over is scratch memory and what is known of each adapter."""
    started = line.started
    assert config.pool_bytes is not None
    weights = 4 * started.parameters
    budgets = config.pool_bytes + config.host_adapter_bytes
    growth = rss - started.rss_before
    return {
        "pool_bytes": config.pool_bytes,
        "host_bytes": config.host_adapter_bytes,
        "weights_bytes": weights,
        "all_images_bytes": run.adapters * SIZES[run.base].adapter_bytes(run.rank),
        "growth_bytes": growth,
        "growth_over_budgets_and_weights": growth / (budgets + weights),
        "other_bytes_per_adapter": (growth - budgets - weights) / run.adapters,
    }


def _profile(run: ManyRun, lines: Mapping[str, Line]) -> dict[str, dict[str, float]]:
    """Of the step loop's functions: microseconds a step, with few adapters known and with many, and calls a step.

    Times include what a function calls, and are longer than without a profiler.
    """
    found: dict[str, dict[str, float]] = {}
    vocabulary, count = SIZES[run.base].vocabulary, min(run.requests, 600)
    for name, line in lines.items():
        trace = crowd_trace(_drawn(run, name, count, 2), run.lengths, vocabulary, seed=2)
        report = line.run(Turn(trace, run.in_flight, with_profile=True))
        steps = report.counts["steps"]
        for one in report.profile:
            figures = found.setdefault(one.name, {})
            figures[f"{name}_us"] = 1e6 * one.seconds / steps
            figures[f"{name}_own_us"] = 1e6 * one.own_seconds / steps
            figures[f"{name}_calls"] = one.calls / steps
    return found


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The record as lines of text."""
    trace, memory, registry = record["trace"], record["memory"], record["registry"]
    rows = [f"{name}: {text}" for name, text in _texts(trace["lines"])]
    rows.append(f"throughput: {trace['ratio']:.3f} of the few's (median of slices {trace['median_slice_ratio']:.3f})")
    rows.append(f"reading alone: {record['cold_load']}")
    rows.append(f"memory: {memory}")
    rows.append(f"registry: {registry}")
    return rows


def _texts(lines: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    keys = ("tokens_per_s", "requests_per_s", "step_ms", "idle_share", "first_median_s", "others_cores")
    return [(name, "  ".join(f"{key}={line[key]:.3f}" for key in keys)) for name, line in lines.items()]
