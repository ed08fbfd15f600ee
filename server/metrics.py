"""What Prometheus scrapes: the edge's own counts and times, and the engine's last snapshot.

One collector per app, filled from the event loop only. Labels are bounded: endpoints are route patterns, ``kind`` is
``base`` or ``adapter`` (a mix is ``adapter``), and no more adapters are named than the settings say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_series import AdapterSeries
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import ERRORS_BY_NAME
from loraplex.server.exposition import Family, LiveCounts, LiveTimes, Rows, gauge
from loraplex.server.histogram import Histogram
from loraplex.server.http_config import MetricsCompat
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.messages import EngineStats
from loraplex.server.slo_hints import SloCounts
from loraplex.server.tenant_metrics import TenantMetrics
from loraplex.server.tenants import DEFAULT_TENANT
from loraplex.server.tier_metrics import tier_families
from loraplex.server.vllm_metrics import Counts, Times, VllmMetrics

Labels = tuple[str, ...]
KINDS: tuple[Labels, ...] = (("base",), ("adapter",))
LOADS: tuple[Labels, ...] = (("remote", "disk"), ("disk", "host"), ("host", "pool"))
OUTCOMES = tuple((*kind, outcome) for kind in KINDS for outcome in ("finished", "failed", "aborted"))
ERROR_TYPES: tuple[Labels, ...] = tuple(sorted({(error.type,) for error in ERRORS_BY_NAME.values()}))
ENGINE_COUNTERS = {
    "adapter_loads": "Adapters paged into the pool.",
    "adapter_load_failures": "Adapters that could not be read.",
    "adapter_prefetches": "Adapters paged into the pool before a sequence needed them.",
    "preemptions": "Sequences put back because pages ran out.",
    "prefix_hit_tokens": "Prompt tokens whose K/V was found in the pool.",
    "steps": "Steps of the engine.",
}


class _Counts(LiveCounts):
    """A counter with labels; the ``known`` ones are there from the start, so that rates see the first increase."""

    def __init__(self, name: str, text: str, labels: Labels, known: Iterable[Labels] = ()) -> None:
        super().__init__(name, text, "counter", labels)
        self._values: Counter[Labels] = Counter(dict.fromkeys(known, 0))

    def add(self, labels: Labels, amount: int = 1) -> None:
        self._values[labels] += amount

    def values(self) -> Iterable[tuple[Labels, float]]:
        return self._values.items()


class _Times(LiveTimes):
    """A histogram of seconds for each ``kind``, or one without labels."""

    def __init__(self, name: str, text: str, labels: Labels = ("kind",), known: Iterable[Labels] = KINDS) -> None:
        super().__init__(name, text, labels)
        self._histograms = {values: Histogram() for values in known}

    def observe(self, seconds: float, *labels: str) -> None:
        self._histograms[labels].observe(seconds)

    def values(self) -> Iterable[tuple[Labels, Histogram]]:
        return self._histograms.items()


class ServerMetrics:
    """Collects for one app. ``registry`` is what ``/metrics`` writes out.

    Attributes:
        tenants: counts by tenant.
        slo: counts hopes of clients.
    """

    def __init__(
        self,
        engine: EngineClient,
        adapters: AdapterRegistry,
        lifecycle: Lifecycle,
        max_adapter_series: int = 0,
        tenants: Iterable[str] = (DEFAULT_TENANT,),
        *,
        compat: MetricsCompat = "none",
    ) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self._adapters = adapters
        self._lifecycle = lifecycle
        self._series = AdapterSeries(engine, adapters, max_adapter_series)
        self._version = version("loraplex")
        self.tenants = TenantMetrics(tenants)
        self._shown: tuple[EngineStats | None, Sequence[Family]] = (None, ())
        kind = ("kind",)
        self._http = _Counts("loraplex_http_requests", "Answered HTTP requests.", ("endpoint", "status"))
        self._errors = _Counts("loraplex_errors", "Requests that ended with an error.", ("type",), ERROR_TYPES)
        self._requests = _Counts("loraplex_requests", "Generation requests that ended.", ("kind", "outcome"), OUTCOMES)
        self._finished = _Counts("loraplex_choices_finished", "Choices that were finished.", ("kind", "reason"))
        self._prompt = _Counts("loraplex_prompt_tokens", "Tokens of prompts.", kind, KINDS)
        self._generated = _Counts("loraplex_generation_tokens", "Tokens generated.", kind, KINDS)
        self._first = _Times("loraplex_time_to_first_token_seconds", "From the request to its first token.")
        self._gaps = _Times("loraplex_inter_token_seconds", "Between two outputs of a choice.")
        self._queued = _Times("loraplex_request_queue_seconds", "From the request to its first step.")
        self._whole = _Times("loraplex_request_seconds", "From the request to its end.")
        self._loads = _Times(
            "loraplex_adapter_load_seconds", "Bringing an adapter from a tier to another.", ("source", "target"), LOADS
        )
        self._step_times = _Times("loraplex_step_seconds", "Steps of the engine.", (), [()])
        self.slo = SloCounts()
        self._vllm = self._vllm_metrics(adapters.base_name) if compat == "vllm" else None
        self.registry.register(self)
        engine.on_stats.append(self.engine_stats)

    def http_request(self, endpoint: str, status: int, error_type: str | None) -> None:
        """A request was answered; ``error_type`` also where the error came after the status."""
        self._http.add((endpoint, str(status)))
        if error_type is not None:
            self._errors.add((error_type,))

    def add_prompt_tokens(self, kind: str, amount: int) -> None:
        self._prompt.add((kind,), amount)

    def first_token(self, kind: str, seconds: float, queue_seconds: float | None) -> None:
        """A request's first output came."""
        self._first.observe(seconds, kind)
        if queue_seconds is not None:
            self._queued.observe(queue_seconds, kind)

    def tokens_came(self, kind: str, amount: int, gap_seconds: float | None) -> None:
        """An output of a choice came, ``gap_seconds`` after the one before it."""
        self._generated.add((kind,), amount)
        if gap_seconds is not None:
            self._gaps.observe(gap_seconds, kind)

    def choice_finished(self, kind: str, reason: str) -> None:
        self._finished.add((kind, reason))

    def request_ended(self, kind: str, outcome: str, seconds: float) -> None:
        """A generation is over: ``finished``, ``failed`` or ``aborted``."""
        self._requests.add((kind, outcome))
        self._whole.observe(seconds, kind)

    def engine_stats(self, stats: EngineStats) -> None:
        """A snapshot came."""
        for load in stats.tier_loads:
            self._loads.observe(load.seconds, load.source, load.target)
        for seconds in stats.step_seconds:
            self._step_times.observe(seconds)

    def collect(self) -> Iterator[Family | Metric]:
        """All families, as the registry asks for them. One that is the same object as before has not changed."""
        yield from (self._http, self._errors, self._requests, self._finished, self._prompt, self._generated)
        yield from (self._first, self._gaps, self._queued, self._whole, self._loads, self._step_times)
        yield from self._engine_families(self._engine.stats)
        yield self._series.family()
        yield from self.tenants.families()
        yield from self._state_families()
        yield self.slo
        if self._vllm is not None:
            yield from self._vllm.families()

    def _vllm_metrics(self, model_name: str) -> VllmMetrics:
        counts = Counts(
            prompt=self._prompt, generated=self._generated, finished=self._finished, requests=self._requests
        )
        times = Times(first=self._first, gaps=self._gaps, queued=self._queued, whole=self._whole)
        return VllmMetrics(model_name, self._engine, self._series, counts, times)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are unique by construction, and the engine need not be asked at registration."""
        return iter(())

    def _engine_families(self, stats: EngineStats) -> Sequence[Family]:
        """Made once for each snapshot."""
        if self._shown[0] is not stats:
            self._shown = stats, tuple(_families_of(stats))
        return self._shown[1]

    def _state_families(self) -> Iterator[Family]:
        restarts = Rows("loraplex_engine_restarts", "Times that the engine was started again.", "counter")
        restarts.add_metric((), self._engine.restarts)
        yield restarts
        ready = self._engine.state == "ready"
        yield gauge("loraplex_engine_up", "Whether the engine is ready.", ready)
        yield gauge("loraplex_draining", "Whether the server takes no new work.", self._lifecycle.draining)
        yield gauge("loraplex_http_requests_in_flight", "POST requests being answered.", self._lifecycle.in_flight)
        yield gauge("loraplex_adapters_registered", "Adapters that requests may name.", len(self._adapters))
        labels = ("version", "architecture", "dtype", "device")
        build = Rows("loraplex_build_info", "What runs here; always 1.", "gauge", labels)
        info = self._engine.info if ready else None
        served = (info.architecture, info.dtype, info.device) if info else ("", "", "")
        build.add_metric((self._version, *served), 1)
        yield build


def _families_of(stats: EngineStats) -> Iterator[Family]:
    for name, text in ENGINE_COUNTERS.items():
        family = Rows(f"loraplex_{name}", text, "counter")
        family.add_metric((), getattr(stats, name))
        yield family
    yield gauge("loraplex_requests_running", "Sequences in the batch.", stats.running)
    yield gauge("loraplex_requests_waiting", "Sequences waiting for their turn.", stats.waiting)
    yield gauge("loraplex_pool_capacity_pages", "Pages of the pool in all.", stats.pages_total)
    yield _gauges(
        "loraplex_pool_pages",
        "Pages of the pool by use.",
        "use",
        {
            "kv": stats.pages_kv,
            "adapter": stats.pages_adapter,
            "cached": stats.pages_cached,
            "free": stats.pages_free,
        },
    )
    yield gauge("loraplex_pool_pinned_pages", "Pages of pinned adapters in the pool.", stats.pages_pinned)
    yield gauge("loraplex_pool_held_pages", "Pages that could not be had by eviction.", stats.pages_held)
    yield from tier_families(stats)
    yield _expert_tokens(stats.expert_tokens)


def _expert_tokens(counts: Mapping[str, Sequence[int]]) -> Family:
    """Empty unless ``expert_metrics`` asks for it."""
    text = "Times that routers chose an expert, of the adapters with the most routed tokens."
    family = Rows("loraplex_expert_tokens", text, "counter", ("adapter", "expert"))
    for adapter, experts in counts.items():
        for expert, tokens in enumerate(experts):
            family.add_metric((adapter, str(expert)), tokens)
    return family


def _gauges(name: str, text: str, label: str, values: dict[str, int]) -> Family:
    family = Rows(name, text, "gauge", (label,))
    for label_value, value in values.items():
        family.add_metric((label_value,), value)
    return family
