"""The engine: scheduler, memory and model behind one queue of commands. One thread; it never waits for disk or network.

``handle`` takes commands in, ``step`` makes one step and returns what it has to say. ``engine_loop.py`` drives it.

Where the runner runs ahead, a step is launched before the result of the one before is taken, so that the device goes on
while the host prepares; two steps are in flight at most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.disk_cache import DiskCache, DiskCacheStats
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.store_states import StoreStats
from loraplex.memory.transfer import TransferStats
from loraplex.server.adapter_calls import AdapterCalls
from loraplex.server.adapter_reports import AdapterReports
from loraplex.server.engine_log import RequestLog, origins
from loraplex.server.errors import EngineError, LoraplexError
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import (
    Abort,
    AdapterTier,
    Command,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    Event,
    Generate,
    LoadAdapter,
    OutputBatch,
    PinAdapter,
    PrefetchAdapter,
    RequestFailed,
    RestoreAdapters,
    TierCount,
    TierLoad,
    TokenOutput,
    UnloadAdapter,
)
from loraplex.server.prefetch_history import HistoryPrefetch
from loraplex.server.rebuild_costs import RebuildCosts
from loraplex.server.scheduler import Scheduler
from loraplex.server.step_plan import Chunk, PendingStep, StepPlan

_log = structlog.get_logger(__name__)


class StepRunner(Protocol):
    """What carries out steps, in the order in which it is told of them."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it takes a step, whose chunks may await a token, before the result of the last one is taken."""

    @property
    def expert_tokens(self) -> dict[str, list[int]]:
        """How often each expert was chosen, by identity, for the adapters with the most."""

    @property
    def transfers(self) -> TransferStats:
        """What has been paged in."""

    def page_in(self, image: AdapterImage, pages: list[int]) -> None:
        """Copy an adapter into its pages, or begin to; from now on chunks may name it."""

    def has_arrived(self, identity: str) -> bool:
        """Whether the copy of an adapter that was paged in is over; never waits."""

    def forget(self, identities: Iterable[str]) -> None:
        """Adapters have left the pool; unknown ones are ignored."""

    def forget_all(self) -> None:
        """Whatever was in the pool is in doubt, and whatever was under way is not wanted."""

    def launch(self, chunks: list[Chunk]) -> PendingStep:
        """Start one forward pass over the chunks, behind all that was started before."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of; ``engine_build.py`` puts it together."""

    info: EngineInfo
    pool: PagePool
    kv: KvCache
    adapters: AdapterCache
    store: AdapterStore
    directory: HostDirectory
    scheduler: Scheduler
    runner: StepRunner
    calls: AdapterCalls
    reports: AdapterReports
    costs: RebuildCosts
    history: HistoryPrefetch | None
    cache: DiskCache | None


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight, launched at ``started`` seconds."""

    plan: StepPlan
    pending: PendingStep
    started: float


class Engine:
    """Serves requests, one step at a time.

    Args:
        parts: wired to one another.
        stats_interval: seconds between two snapshots of the statistics.
    """

    def __init__(self, parts: EngineParts, stats_interval: float = 0.1) -> None:
        self._parts = parts
        self._events: list[Event] = []
        self._failed: list[RequestFailed] = []
        self._stats_interval = stats_interval
        self._stats_at = 0.0
        self._last_stats: EngineStats | None = None
        self._in_flight: _Launched | None = None
        self._steps = 0
        self._completed_at = 0.0
        self._step_seconds: list[float] = []
        self._tier_loads: list[TierLoad] = []
        self._request_log = RequestLog()

    @property
    def info(self) -> EngineInfo:
        return self._parts.info

    @property
    def is_runnable(self) -> bool:
        """Whether a step would get on: one is in flight, or something runs, or waits for more than a load."""
        scheduler = self._parts.scheduler
        is_busy = self._in_flight is not None or len(scheduler.page_ins) > 0
        return is_busy or scheduler.num_running > 0 or scheduler.num_ready > 0

    @property
    def has_work(self) -> bool:
        """Whether any request or call is open, or a step in flight."""
        parts = self._parts
        is_busy = parts.scheduler.has_work or self._in_flight is not None or len(parts.scheduler.page_ins) > 0
        return is_busy or parts.calls.has_work or parts.scheduler.prefetcher.has_work

    @property
    def has_prospects(self) -> bool:
        """Whether an idle engine should look again in a while for what it could bring up."""
        return self._parts.history is not None and self._parts.history.is_active

    def handle(self, command: Command) -> None:
        """Take a command in. Errors become events."""
        match command:
            case Generate():
                self._generate(command)
            case Abort(request_id=request_id, index=index):
                self._parts.scheduler.abort(request_id, index)
                if self._request_log.is_on:
                    self._request_log.aborted(request_id, index)
            case LoadAdapter() | UnloadAdapter() | PrefetchAdapter() | PinAdapter() | RestoreAdapters():
                self._answer(self._parts.calls.handle(command))
            case _:
                raise AssertionError(f"no command for the engine: {command}")

    def _generate(self, command: Generate) -> None:
        if self._request_log.is_on:
            self._request_log.taken(command)
        try:
            self._parts.scheduler.add(command)
        except LoraplexError as error:
            failed = RequestFailed(request_id=command.request_id, error=ErrorInfo.of(error), origin=command.origin)
            self._failed.append(failed)
        else:
            refs = [command.adapter] if command.adapter is not None else [part.adapter for part in command.mix]
            self._parts.calls.note_request(refs)

    def _answer(self, answers: list[Event]) -> None:
        """Whoever made a call should find its effect when the answer is there."""
        if answers:
            self._append_states()
            self._events += answers

    def step(self) -> list[Event]:
        """Make one step, if anything is runnable, and return all that there is to say since the last call."""
        self._note_arrivals()
        self._follow_tiers()
        self._answer(self._parts.calls.poll())
        if self._parts.history is not None and self._parts.scheduler.num_waiting == 0:
            self._parts.history.poll()
        outputs: list[TokenOutput] = []
        try:
            self._run_step(outputs)
            self._answer(self._parts.calls.poll())
        except Exception as error:
            self._in_flight = None
            failed = self._parts.scheduler.fail_all(
                EngineError(f"The engine failed in a step: {type(error).__name__}.")
            )
            _log.exception("a step failed; its requests end with an error", request_ids=origins(failed))
            self._failed += failed
            self._distrust_pool()
        if outputs or self._failed:
            if self._request_log.is_on:
                self._request_log.told(outputs, self._failed)
            self._events.append(OutputBatch(outputs=outputs, failed=self._failed))
            self._failed = []
        self._append_stats()
        events, self._events = self._events, []
        return events

    def _run_step(self, outputs: list[TokenOutput]) -> None:
        """Launch the next step, if there is one, and take the result of the one before, or of this one."""
        if self._in_flight is not None and self._in_flight.plan.needs_completion:
            self._complete(outputs)
        launched = self._launch_next()
        if self._in_flight is not None:
            self._complete(outputs)
        self._in_flight = launched
        if launched is not None and not self._parts.runner.runs_ahead:
            self._complete(outputs)

    def _launch_next(self) -> _Launched | None:
        started = time.perf_counter()
        plan = self._parts.scheduler.schedule()
        self._failed += plan.failed
        self._page_in(plan)
        if not plan.chunks:
            self._note_arrivals()
            return None
        return _Launched(plan, self._parts.runner.launch(plan.chunks), started)

    def _complete(self, outputs: list[TokenOutput]) -> None:
        """Wait for the step in flight and add what it has to say."""
        assert self._in_flight is not None
        step, self._in_flight = self._in_flight, None
        result = step.pending.result()
        outputs += self._parts.scheduler.complete(step.plan, result.sampled, result.prompt_logprobs, result.routing)
        now = time.perf_counter()
        self._steps += 1
        # Of a step that was launched while another one ran, the time in which it had the device to itself.
        seconds = now - max(step.started, self._completed_at)
        self._step_seconds.append(seconds)
        self._parts.costs.note_step(step.plan.num_tokens, seconds)
        self._completed_at = now
        self._note_arrivals()

    def _distrust_pool(self) -> None:
        """After a step that failed half-way anything in the pool may be half written: it is all made afresh."""
        for identity in self._parts.adapters.resident:
            self._parts.adapters.drop(identity)
        self._parts.kv.prefixes.clear()
        self._parts.runner.forget_all()

    def _page_in(self, plan: StepPlan) -> None:
        if plan.page_ins:
            self._follow_tiers()
        for page_in in plan.page_ins:
            self._parts.runner.page_in(self._parts.directory.image(page_in.ref), page_in.pages)
            if self._parts.runner.has_arrived(page_in.identity):
                self._parts.scheduler.page_ins.note_copied(page_in.identity)

    def _follow_tiers(self) -> None:
        self._parts.runner.forget(self._parts.reports.follow())

    def _note_arrivals(self) -> None:
        """Let go of what copies that are over have kept."""
        page_ins = self._parts.scheduler.page_ins
        for identity in page_ins.under_way:
            if self._parts.runner.has_arrived(identity):
                page_ins.end(identity)

    def _append_states(self) -> None:
        self._follow_tiers()
        states = self._parts.reports.take()
        if states is not None:
            self._events.append(states)

    def _append_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at < self._stats_interval and self.has_work:
            return
        self._append_states()
        parts = self._parts
        self._tier_loads += [TierLoad("host", "pool", seconds) for seconds in parts.runner.transfers.take_recent()]
        self._tier_loads += [TierLoad("disk", "host", seconds) for seconds in parts.store.take_recent()]
        if parts.cache is not None:
            self._tier_loads += [TierLoad("remote", "disk", seconds) for seconds in parts.cache.take_recent()]
        stats = self.stats()
        if stats != self._last_stats:
            self._events.append(stats)
            self._last_stats = stats
            self._stats_at = now
            self._step_seconds, self._tier_loads = [], []

    def stats(self) -> EngineStats:
        """A snapshot."""
        parts = self._parts
        store = parts.store.stats
        disk = None if parts.cache is None else parts.cache.stats()
        lookups, evictions = _tier_counts(parts, store, disk)
        return EngineStats(
            running=parts.scheduler.num_running,
            waiting=parts.scheduler.num_waiting,
            pages_total=parts.pool.num_pages,
            pages_kv=parts.kv.num_pages,
            pages_adapter=parts.adapters.num_pages,
            pages_free=parts.pool.num_free,
            pages_cached=parts.kv.prefixes.num_idle_pages,
            pages_pinned=parts.adapters.kept_pages,
            pages_held=parts.pool.num_pages - parts.pool.num_reachable,
            host_bytes=store.host_bytes,
            host_bytes_limit=store.byte_limit,
            adapters_resident=len(parts.adapters.resident),
            adapter_loads=parts.adapters.loads,
            adapter_evictions=parts.adapters.evictions,
            adapter_load_failures=store.failures,
            adapter_prefetches=parts.scheduler.prefetcher.prefetched,
            preemptions=parts.scheduler.preemptions,
            prefix_hit_tokens=parts.scheduler.prefix_hit_tokens,
            steps=self._steps,
            expert_tokens=parts.directory.by_name(parts.runner.expert_tokens),
            disk_bytes=0 if disk is None else disk.num_bytes + disk.pending_bytes,
            disk_bytes_limit=0 if disk is None else disk.byte_limit,
            tiers=list(parts.reports.uses(store, disk)),
            lookups=lookups,
            evictions=evictions,
            tier_loads=self._tier_loads,
            step_seconds=self._step_seconds,
        )

    def check_integrity(self) -> None:
        """AssertionError where the owners of pages disagree."""
        self._parts.scheduler.check_integrity()

    def close(self) -> None:
        """Stop the loader threads, once no copy reads what they have laid out."""
        with contextlib.suppress(RuntimeError):  # the device may be what failed
            self._parts.runner.forget_all()
        self._parts.store.close()


def _tier_counts(
    parts: EngineParts, store: StoreStats, disk: DiskCacheStats | None
) -> tuple[list[TierCount], list[TierCount]]:
    """How often adapters were found in a tier or not, and how often they left it, by reason."""
    lookups = [TierCount(tier, what, count) for (tier, what), count in sorted(parts.scheduler.lookups.items())]
    reasons: dict[AdapterTier, Mapping[str, int]] = {
        "pool": parts.adapters.evictions_by_reason,
        "host": store.evictions_by_reason,
    }
    if disk is not None:
        lookups += [TierCount("disk", "hit", disk.hits), TierCount("disk", "miss", disk.misses)]
        reasons["disk"] = disk.evictions
    evictions = [
        TierCount(tier, reason, count) for tier, counts in reasons.items() for reason, count in sorted(counts.items())
    ]
    return lookups, evictions
