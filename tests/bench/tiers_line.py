"""Engines that are compared: alive together, each in a process of its own, of which one runs at a time."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
from tiers_profile import Profiled, profiled
from tiers_trace import Asked

from loraplex.server.engine import Engine
from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.messages import (
    AdapterRef,
    CallDone,
    CallFailed,
    EngineStats,
    Generate,
    OutputBatch,
    PrefetchAdapter,
    SamplingParams,
)

_CALLS_AT_ONCE = 16
_PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    """What a line is to do.

    Attributes:
        trace: requests; they arrive when they say, or as others end where ``in_flight`` bounds those that are open.
        with_profile: count the calls of the step loop's functions; the times are not to be used otherwise.
        prefetch: adapters to bring up to ``tier`` beforehand.
    """

    trace: Sequence[Asked] = ()
    in_flight: int | None = None
    with_profile: bool = False
    prefetch: Sequence[int] = ()
    tier: Literal["host", "pool"] = "host"


@dataclass(slots=True)
class Report:
    """What came of a turn.

    Attributes:
        seconds: until the last answer was complete.
        idle_seconds: in which there was nothing to compute, of them.
        first: seconds from each request's arrival to its first token, by its place in the trace.
        answers: token ids, likewise.
        failures: what clients would have been told.
        counts: how much the engine's counters went up, by name.
        cpu_seconds: of the step loop, of other threads of Python (loaders) and of the rest (operators).
        others_cpu_seconds: that other processes have taken from the machine meanwhile.
        prefetch_seconds, prefetch_cpu_seconds: what was spent beforehand, likewise.
        rss: bytes of the process at the end.
        profile: costs of functions.
    """

    seconds: float = 0.0
    idle_seconds: float = 0.0
    first: dict[int, float] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    others_cpu_seconds: float = 0.0
    prefetch_seconds: float = 0.0
    prefetch_cpu_seconds: dict[str, float] = field(default_factory=dict)
    rss: int = 0
    profile: list[Profiled] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers.values()))


@dataclass(frozen=True, slots=True)
class Started:
    """An engine is ready: bytes of its process before it was built and after, and the seconds that took."""

    rss_before: int
    rss_after: int
    seconds: float
    num_pages: int
    parameters: int


class Line(Protocol):
    """An engine that has its turns."""

    started: Started

    def run(self, turn: Turn) -> Report:
        """Have a turn."""

    def close(self) -> None:
        """End, if the engine's memory is whole. AssertionError if not."""


def start_lines(configs: Mapping[str, EngineConfig], paths: Sequence[str], *, inline: bool) -> dict[str, Line]:
    """An engine for each configuration, by name.

    Args:
        paths: of the adapters.
        inline: all in this process, whose memory then says little; a test has no time for more processes.
    """
    return {name: (_Inline if inline else _Process)(config, paths) for name, config in configs.items()}


class _Inline:
    """A line in this process."""

    def __init__(self, config: EngineConfig, paths: Sequence[str]) -> None:
        process, changed = psutil.Process(), threading.Event()
        before, begun = process.memory_info().rss, time.perf_counter()
        self._engine = build_engine(config, on_change=changed.set)
        seconds, info = time.perf_counter() - begun, self._engine.info
        self.started = Started(before, process.memory_info().rss, seconds, info.num_pages, info.num_parameters)
        refs = [AdapterRef(name=Path(path).name, path=path) for path in paths]
        self._driver = _Driver(self._engine, changed, refs)

    def run(self, turn: Turn) -> Report:
        return self._driver.run(turn)

    def close(self) -> None:
        self._engine.check_integrity()
        self._engine.close()


class _Process:
    """A line in a process of its own. ``run`` has EOFError where that has ended; it has said why."""

    def __init__(self, config: EngineConfig, paths: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, config, list(paths)), daemon=True)
        self._process.start()
        other.close()
        self.started: Started = self._pipe.recv()

    def run(self, turn: Turn) -> Report:
        self._pipe.send(turn)
        report: Report = self._pipe.recv()
        return report

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        assert self._process.exitcode == 0, "an engine did not end well"


def _serve(pipe: Connection[Any, Any], config: EngineConfig, paths: list[str]) -> None:
    line = _Inline(config, paths)
    pipe.send(line.started)
    while (turn := pipe.recv()) is not None:
        pipe.send(line.run(turn))
    line.close()


class _Driver:
    """Gives an engine its requests and notes when they are answered."""

    def __init__(self, engine: Engine, changed: threading.Event, refs: Sequence[AdapterRef]) -> None:
        self._engine = engine
        self._changed = changed
        self._refs = refs
        self._turns = 0
        self._loads: defaultdict[str, float] = defaultdict(float)
        self._calls: set[str] = set()
        self._report = Report()
        self._started = 0.0
        self._arrived: dict[str, tuple[int, float]] = {}

    def run(self, turn: Turn) -> Report:
        self._turns += 1
        self._report = report = Report()
        cpu, self._started = _cpu_seconds(), time.perf_counter()
        self._prefetch(turn)
        report.prefetch_seconds, report.idle_seconds = time.perf_counter() - self._started, 0.0
        report.prefetch_cpu_seconds = _spent_since(cpu)
        counts, cpu, others = self._counts(), _cpu_seconds(), _others_cpu_seconds()
        self._started = time.perf_counter()
        with profiled(turn.with_profile) as report.profile:
            self._answer(turn)
        report.seconds = time.perf_counter() - self._started
        report.cpu_seconds = _spent_since(cpu)
        report.others_cpu_seconds = _others_cpu_seconds() - others
        report.counts = {name: count - counts.get(name, 0) for name, count in self._counts().items()}
        report.rss = psutil.Process().memory_info().rss
        return report

    def _prefetch(self, turn: Turn) -> None:
        """A few at a time: an engine looks at every open call in every step."""
        left = list(turn.prefetch)
        while left or self._calls:
            while left and len(self._calls) < _CALLS_AT_ONCE:
                index = left.pop()
                call_id = f"{self._turns}-{index}"
                self._calls.add(call_id)
                self._engine.handle(PrefetchAdapter(call_id=call_id, adapter=self._refs[index], tier=turn.tier))
            self._step()
            if len(self._calls) == _CALLS_AT_ONCE or not left:
                self._rest(_PATIENCE if self._calls else 0.0)

    def _answer(self, turn: Turn) -> None:
        trace, begun = turn.trace, 0
        while begun < len(trace) or self._arrived:
            now = self._now()
            while begun < len(trace) and self._may_begin(turn, trace[begun], now):
                self._send(begun, trace[begun], now if turn.in_flight else trace[begun].at)
                begun += 1
            self._step()
            self._rest(self._patience(turn, trace[begun] if begun < len(trace) else None))

    def _patience(self, turn: Turn, asked: Asked | None) -> float:
        """Seconds until there is another request to send, or nothing more to wait for."""
        if asked is None:
            return _PATIENCE if self._arrived else 0.0
        if turn.in_flight is None:
            return max(0.0, asked.at - self._now())
        return 0.0 if len(self._arrived) < turn.in_flight else _PATIENCE

    def _may_begin(self, turn: Turn, asked: Asked, now: float) -> bool:
        return asked.at <= now if turn.in_flight is None else len(self._arrived) < turn.in_flight

    def _send(self, index: int, asked: Asked, arrived_at: float) -> None:
        params = SamplingParams(max_tokens=asked.num_out, temperature=0.0, ignore_eos=True)
        ref = None if asked.adapter is None else self._refs[asked.adapter]
        request_id = f"{self._turns}/{index}"
        self._arrived[request_id] = index, arrived_at
        self._engine.handle(Generate(request_id=request_id, prompt_ids=asked.prompt, params=params, adapter=ref))

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _step(self) -> None:
        self._changed.clear()
        for event in self._engine.step():
            match event:
                case OutputBatch():
                    self._take(event)
                case CallDone(call_id=call_id):
                    self._calls.remove(call_id)
                case CallFailed():
                    raise AssertionError(f"an adapter cannot be read: {event.error.message}")
                case EngineStats(tier_loads=loads):
                    for load in loads:
                        self._loads[f"{load.source} to {load.target}"] += 1
                        self._loads[f"{load.source} to {load.target} seconds"] += load.seconds

    def _rest(self, patience: float) -> None:
        """Wait at most so many seconds for an adapter to be read, unless there is something to compute."""
        if patience and not self._engine.is_runnable:
            begun = self._now()
            self._changed.wait(min(patience, _PATIENCE))
            self._report.idle_seconds += self._now() - begun

    def _take(self, batch: OutputBatch) -> None:
        now, report = self._now(), self._report
        for output in batch.outputs:
            index, arrived_at = self._arrived[output.request_id]
            if output.token_ids:
                report.first.setdefault(index, now - arrived_at)
                report.answers.setdefault(index, []).extend(output.token_ids)
            if output.finish_reason is not None:
                del self._arrived[output.request_id]
        for failure in batch.failed:
            del self._arrived[failure.request_id]
            report.failures.append(failure.error.message)

    def _counts(self) -> dict[str, float]:
        """The engine's counters, those of loads as far as they have been told."""
        stats = self._engine.stats()
        counts = defaultdict(float, self._loads)
        for count in stats.lookups:
            counts[f"{count.tier} {count.what}"] = count.count
        for count in stats.evictions:
            counts[f"{count.tier} evicted for {count.what}"] = count.count
        for name in ("steps", "preemptions", "prefix_hit_tokens", "adapter_loads", "adapter_prefetches"):
            counts[name] = getattr(stats, name)
        return counts


def _cpu_seconds() -> dict[str, float]:
    """By kind of thread; threads that have ended are left out."""
    own = threading.get_native_id()
    python = {thread.native_id for thread in threading.enumerate()}
    spent: defaultdict[str, float] = defaultdict(float)
    for thread in psutil.Process().threads():
        kind = "step loop" if thread.id == own else "loaders" if thread.id in python else "operators"
        spent[kind] += thread.user_time + thread.system_time
    return dict(spent)


def _spent_since(before: dict[str, float]) -> dict[str, float]:
    return {name: spent - before.get(name, 0.0) for name, spent in _cpu_seconds().items()}


def _others_cpu_seconds() -> float:
    """Of all other processes since the machine's start; steal of a virtual machine's host counts as one of them."""
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return float(busy) - time.process_time()
