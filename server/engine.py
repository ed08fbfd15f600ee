"""The engine: scheduler, memory and model behind one queue of commands. One thread; it never waits for disk or network.

``handle`` takes commands in, ``step`` makes one step and returns what it has to say. ``engine_loop.py`` drives it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
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
from loraplex.server.model_runner import ModelRunner, StepResult
from loraplex.server.scheduler import Scheduler
from loraplex.server.step_plan import PageIn, StepPlan

_log = structlog.get_logger(__name__)


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
    runner: ModelRunner


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
        self._steps = 0
        self._step_seconds: list[float] = []
        self._load_seconds: list[float] = []

    @property
    def info(self) -> EngineInfo:
        return self._parts.info

    @property
    def is_runnable(self) -> bool:
        """Whether a step would get on: something runs, or waits for more than a load."""
        scheduler = self._parts.scheduler
        return scheduler.num_running > 0 or scheduler.num_ready > 0

    @property
    def has_work(self) -> bool:
        """Whether any request or call is open."""
        return self._parts.scheduler.has_work or bool(self._loads)

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
        outputs = self._run_step()
        if outputs or self._failed:
            self._events.append(OutputBatch(outputs=outputs, failed=self._failed))
            self._failed = []
        self._append_stats()
        events, self._events = self._events, []
        return events

    def _run_step(self) -> list[TokenOutput]:
        started = time.perf_counter()
        scheduler = self._parts.scheduler
        try:
            plan = scheduler.schedule()
            self._failed += plan.failed
            if not plan.chunks:
                return []
            result = self._execute(plan)
            outputs = scheduler.complete(plan, result.sampled, result.prompt_logprobs, result.routing)
        except Exception as error:
            _log.exception("a step failed; its requests end with an error")
            self._failed += scheduler.fail_all(EngineError(f"The engine failed in a step: {type(error).__name__}."))
            self._distrust_pool()
            return []
        self._steps += 1
        self._step_seconds.append(time.perf_counter() - started)
        return outputs

    def _distrust_pool(self) -> None:
        """After a step that failed half-way anything in the pool may be half written: it is all made afresh."""
        for identity in self._parts.adapters.resident:
            self._parts.adapters.drop(identity)
        self._parts.kv.prefixes.clear()
        self._parts.runner.keep_only(())

    def _execute(self, plan: StepPlan) -> StepResult:
        if plan.page_ins:
            self._parts.runner.keep_only(self._parts.adapters.resident)
        for page_in in plan.page_ins:
            self._page_in(page_in)
        return self._parts.runner.run(plan.chunks)

    def _page_in(self, page_in: PageIn) -> None:
        started = time.perf_counter()
        self._parts.runner.page_in(self._parts.directory.image(page_in.ref), page_in.pages)
        self._load_seconds.append(time.perf_counter() - started)

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
