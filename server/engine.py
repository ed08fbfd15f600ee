"""The engine: scheduler, memory and model behind one queue of commands. One thread; it never waits for disk or network.

``handle`` takes commands in, ``step`` makes one step and returns what it has to say. ``engine_loop.py`` drives it.

Where the runner runs ahead, a step is launched before the result of the one before is taken, so that the device goes on
while the host prepares; two steps are in flight at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.transfer import TransferStats
from loraplex.server.adapter_directory import AdapterFailed, AdapterReady
from loraplex.server.errors import EngineError, LoraplexError
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import (
    Abort,
    CallDone,
    CallFailed,
    Command,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    Event,
    Generate,
    ListAdapters,
    LoadAdapter,
    OutputBatch,
    RequestFailed,
    TokenOutput,
    UnloadAdapter,
)
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

    def keep_only(self, identities: Iterable[str]) -> None:
        """Forget adapters that left the pool."""

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

    def __init__(self, parts: EngineParts, stats_interval: float = 0.25) -> None:
        self._parts = parts
        self._events: list[Event] = []
        self._failed: list[RequestFailed] = []
        self._loads: list[LoadAdapter] = []
        self._stats_interval = stats_interval
        self._stats_at = 0.0
        self._last_stats: EngineStats | None = None
        self._in_flight: _Launched | None = None
        self._steps = 0
        self._completed_at = 0.0
        self._step_seconds: list[float] = []
        self._load_seconds: list[float] = []

    @property
    def info(self) -> EngineInfo:
        return self._parts.info

    @property
    def is_runnable(self) -> bool:
        """Whether a step would get on: one is in flight, or something runs, or waits for more than a load."""
        scheduler = self._parts.scheduler
        return self._in_flight is not None or scheduler.num_running > 0 or scheduler.num_ready > 0

    @property
    def has_work(self) -> bool:
        """Whether any request or call is open, or a step in flight."""
        return self._parts.scheduler.has_work or self._in_flight is not None or bool(self._loads)

    def handle(self, command: Command) -> None:
        """Take a command in. Errors become events."""
        match command:
            case Generate():
                self._generate(command)
            case Abort(request_id=request_id, index=index):
                self._parts.scheduler.abort(request_id, index)
            case LoadAdapter():
                self._parts.directory.hold(command.adapter)
                self._loads.append(command)
            case UnloadAdapter(call_id=call_id, adapter=adapter):
                self._parts.directory.forget(adapter)
                self._events.append(CallDone(call_id=call_id))
            case ListAdapters(call_id=call_id):
                adapters = self._parts.directory.infos(self._parts.scheduler.running_by_adapter)
                self._events.append(CallDone(call_id=call_id, adapters=adapters))
            case _:
                raise AssertionError(f"no command for the engine: {command}")

    def _generate(self, command: Generate) -> None:
        try:
            self._parts.scheduler.add(command)
        except LoraplexError as error:
            self._failed.append(RequestFailed(request_id=command.request_id, error=ErrorInfo.of(error)))

    def step(self) -> list[Event]:
        """Make one step, if anything is runnable, and return all that there is to say since the last call."""
        self._poll_loads()
        outputs: list[TokenOutput] = []
        try:
            self._run_step(outputs)
        except Exception as error:
            _log.exception("a step failed; its requests end with an error")
            self._in_flight = None
            self._failed += self._parts.scheduler.fail_all(
                EngineError(f"The engine failed in a step: {type(error).__name__}.")
            )
            self._distrust_pool()
        if outputs or self._failed:
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
        return _Launched(plan, self._launch(plan), started) if plan.chunks else None

    def _complete(self, outputs: list[TokenOutput]) -> None:
        """Wait for the step in flight and add what it has to say."""
        assert self._in_flight is not None
        step, self._in_flight = self._in_flight, None
        result = step.pending.result()
        outputs += self._parts.scheduler.complete(step.plan, result.sampled, result.prompt_logprobs, result.routing)
        now = time.perf_counter()
        self._steps += 1
        # Of a step that was launched while another one ran, the time in which it had the device to itself.
        self._step_seconds.append(now - max(step.started, self._completed_at))
        self._completed_at = now

    def _distrust_pool(self) -> None:
        """After a step that failed half-way anything in the pool may be half written: it is all made afresh."""
        for identity in self._parts.adapters.resident:
            self._parts.adapters.drop(identity)
        self._parts.kv.prefixes.clear()
        self._parts.runner.keep_only(())

    def _launch(self, plan: StepPlan) -> PendingStep:
        if plan.page_ins:
            self._parts.runner.keep_only(self._parts.adapters.resident)
        for page_in in plan.page_ins:
            self._parts.runner.page_in(self._parts.directory.image(page_in.ref), page_in.pages)
        return self._parts.runner.launch(plan.chunks)

    def _poll_loads(self) -> None:
        """Answer the calls whose adapters have been read or have failed."""
        still: list[LoadAdapter] = []
        for call in self._loads:
            match self._parts.directory.lookup(call.adapter):
                case AdapterReady(num_pages=num_pages):
                    self._answer_load(call, num_pages)
                case AdapterFailed(error):
                    self._end_load(call, error)
                case _:
                    still.append(call)
        self._loads = still

    def _answer_load(self, call: LoadAdapter, num_pages: int) -> None:
        directory = self._parts.directory
        try:
            directory.check_size(call.adapter, num_pages)
        except LoraplexError as error:
            self._end_load(call, error)
            return
        info = directory.info(call.adapter)
        directory.release_hold(call.adapter)
        self._events.append(CallDone(call_id=call.call_id, adapter=info))

    def _end_load(self, call: LoadAdapter, error: LoraplexError) -> None:
        self._parts.directory.release_hold(call.adapter)
        self._parts.directory.forget(call.adapter)
        self._events.append(CallFailed(call_id=call.call_id, error=ErrorInfo.of(error)))

    def _append_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at < self._stats_interval and self.has_work:
            return
        self._load_seconds += self._parts.runner.transfers.take_recent()
        stats = self.stats()
        if stats != self._last_stats:
            self._events.append(stats)
            self._last_stats = stats
            self._stats_at = now
            self._step_seconds, self._load_seconds = [], []

    def stats(self) -> EngineStats:
        """A snapshot."""
        parts = self._parts
        store = parts.store.stats
        return EngineStats(
            running=parts.scheduler.num_running,
            waiting=parts.scheduler.num_waiting,
            pages_total=parts.pool.num_pages,
            pages_kv=parts.kv.num_pages,
            pages_adapter=parts.adapters.num_pages,
            pages_free=parts.pool.num_free,
            pages_cached=parts.kv.prefixes.num_idle_pages,
            adapters_resident=len(parts.adapters.resident),
            adapters_host=store.images,
            host_bytes=store.host_bytes,
            host_bytes_limit=store.byte_limit,
            adapter_hits=parts.adapters.hits,
            adapter_loads=parts.adapters.loads,
            adapter_evictions=parts.adapters.evictions,
            adapter_load_failures=store.failures,
            preemptions=parts.scheduler.preemptions,
            prefix_hit_tokens=parts.scheduler.prefix_hit_tokens,
            steps=self._steps,
            expert_tokens=parts.directory.by_name(parts.runner.expert_tokens),
            load_seconds=self._load_seconds,
            step_seconds=self._step_seconds,
        )

    def check_integrity(self) -> None:
        """AssertionError where the owners of pages disagree."""
        self._parts.scheduler.check_integrity()

    def close(self) -> None:
        """Stop the loader threads."""
        self._parts.store.close()
