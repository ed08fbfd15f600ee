"""OpenTelemetry spans of requests: FastAPI makes the server span, this module says what a generation was in it, and
makes spans of what the engine did from the times that it told.

Nothing of a prompt or an answer gets into a span. Needs OpenTelemetry's interface alone; what sends spans is in
``otlp_export.py``, imported where somebody asks for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version

import structlog
from opentelemetry.trace import Span, StatusCode, Tracer, TracerProvider, set_span_in_context
from opentelemetry.util.types import AttributeValue

from loraplex.server.generation_record import GenerationRecord
from loraplex.server.lazy import load
from loraplex.server.request_timing import PromptTimes
from loraplex.server.request_trace import RequestTrace
from loraplex.server.settings import SettingsError
from loraplex.server.span_times import AdapterLoad, AdapterUse, BeginTimes, FailTimes, short_identity

MOST_PROMPTS = 16
"""So many prompts of one request get spans of their own."""

_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_log = structlog.get_logger(__name__)

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where spans go.

    Attributes:
        provider: of the tracers.
        close: sends what is left, for so many seconds at most.
    """

    provider: TracerProvider
    close: Callable[[float], Awaitable[None]]


def make_tracing(endpoint: str | None) -> Tracing | None:
    """What the settings or, without an endpoint in them, OpenTelemetry's own variables ask for; None is no tracing.

    Raises:
        SettingsError: there is an endpoint in the settings, and the extra ``otel`` is not installed.
    """
    if endpoint is None and not _environment_asks():
        return None
    try:
        tracing: Tracing = load("loraplex.server.otlp_export:open_tracing")(endpoint)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        advice = "traces need the extra 'otel': pip install 'loraplex[otel]'"
        if endpoint is not None:
            raise SettingsError(f"otlp_endpoint: {advice}", param="otlp_endpoint") from None
        _log.warning("no traces are sent, though the environment names a collector", reason=advice)
        return None
    return tracing


def _environment_asks() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return False
    return any(os.environ.get(name, "").strip() for name in _ENDPOINT_VARIABLES)


class RequestSpans:
    """Describes requests in their server spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("loraplex", version("loraplex"))

    def finish(self, trace: RequestTrace, query: bytes = b"") -> None:
        """Say all that is known of a request; its server span is about to end."""
        span = trace.span
        if span is None or not span.is_recording():
            return
        span.set_attribute("loraplex.request.id", trace.request_id)
        if query:
            span.set_attribute("url.query", "REDACTED")  # clients may put keys there
        if trace.tenant is not None:
            span.set_attribute("loraplex.tenant", trace.tenant)
        if trace.error_type is not None:
            span.set_attributes({"error.type": trace.error_type, "loraplex.error.type": trace.error_type})
            if trace.status is not None and trace.status < 400:
                span.set_status(StatusCode.ERROR, "the stream ended with an error")
        if trace.generation is not None:
            span.set_attributes(generation_attributes(trace.generation))
            _EngineSpans(self._tracer, span, trace, trace.generation).make()


def generation_attributes(record: GenerationRecord) -> Attributes:
    """By the semantic conventions of generative AI, and ours for what these do not know."""
    generation, params = record.generation, record.generation.job.commands[0].params
    found: Attributes = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": "loraplex",
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": generation.job.n,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.response.model": record.base_name,
        "gen_ai.usage.input_tokens": generation.job.prompt_tokens,
        "gen_ai.usage.output_tokens": generation.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        "gen_ai.response.finish_reasons": list(generation.finish_reasons),
        "loraplex.outcome": generation.outcome,
        "loraplex.prompt.count": len(generation.job.commands),
    }
    if generation.timing.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = generation.timing.time_to_first_token
    return found | _adapter_attributes(record)


def _adapter_attributes(record: GenerationRecord) -> Attributes:
    names, uses = record.adapters, record.uses
    if not names:
        return {}
    if len(names) > 1:
        found: Attributes = {"loraplex.adapter.ids": names, "loraplex.adapter.weights": record.weights}
        return found | ({"loraplex.adapter.identities": [short_identity(use.identity) for use in uses]} if uses else {})
    return {"loraplex.adapter.id": names[0]} | (_use_attributes(uses[0]) if uses else {})


def _use_attributes(use: AdapterUse) -> Attributes:
    return {
        "loraplex.adapter.id": use.name,
        "loraplex.adapter.identity": short_identity(use.identity),
        "loraplex.adapter.kind": use.kind,
    }


class _EngineSpans:
    """The spans of one generation: per prompt, ``queue``, ``adapter_load``, ``prefill`` and ``decode``."""

    def __init__(self, tracer: Tracer, parent: Span, trace: RequestTrace, record: GenerationRecord) -> None:
        self._tracer, self._trace, self._record = tracer, trace, record
        self._context = set_span_in_context(parent)
        self._timing = record.generation.timing
        # Both clocks are read here, once: the monotonic one is common to the processes, the other one to all machines.
        self._epoch = time.time_ns() - time.monotonic_ns()
        self._now = time.monotonic()

    def make(self) -> None:
        timing = self._timing
        if timing.sent is None:
            return
        prompts = timing.prompts
        for at in range(min(len(self._record.generation.job.commands), MOST_PROMPTS)):
            shared: Attributes = {"loraplex.prompt.index": at} if len(self._record.generation.job.commands) > 1 else {}
            prompt = prompts.get(at)
            if prompt is not None and prompt.began is not None:
                self._began(prompt, prompt.began, shared)
            elif timing.failed is not None and timing.failed.command == at:
                self._failed(timing.failed.times, shared)
            else:
                end = self._add("wait", timing.sent, timing.ended or self._now, shared)
                self._close(end, timing.ended or self._now, is_open=True)

    def _began(self, prompt: PromptTimes, began: BeginTimes, shared: Attributes) -> None:
        self._close(self._add("queue", began.arrived, began.scheduled, shared), began.scheduled)
        for use in began.adapters:
            for one in use.loads:
                self._load(one, began, shared | _use_attributes(use))
        early = [at for at in prompt.preempted if at < began.first_output]
        cached: Attributes = {"loraplex.prompt.cached_tokens": prompt.cached_tokens}
        prefill = self._add("prefill", began.scheduled, began.first_output, shared | cached)
        self._preempted(prefill, early)
        self._close(prefill, began.first_output)
        if not self._record.generation.completion_tokens:
            return
        is_open = prompt.num_over < self._record.generation.job.n
        ended = (self._timing.ended or self._now) if is_open else prompt.ended
        decode = self._add("decode", began.first_output, ended, shared)
        decode.add_event("first_token", timestamp=self._ns(began.first_output))
        self._preempted(decode, [at for at in prompt.preempted if at >= began.first_output])
        self._close(decode, ended, is_open=is_open)

    def _load(self, one: AdapterLoad, began: BeginTimes, attributes: Attributes) -> None:
        """A load that others had begun is part of this request from its arrival on."""
        ended = one.ended if one.ended is not None else began.first_output
        attributes = attributes | {
            "loraplex.adapter.load.source": one.source,
            "loraplex.adapter.load.target": one.target,
            "loraplex.adapter.load.bytes": one.num_bytes,
            "loraplex.adapter.load.seconds": ended - one.started,
        }
        if ended > began.arrived:
            self._close(self._add("adapter_load", max(one.started, began.arrived), ended, attributes), ended)

    def _failed(self, times: FailTimes, shared: Attributes) -> None:
        self._close(self._add("queue", times.arrived, times.ended, shared), times.ended, is_open=True)
        if times.adapter is not None:
            started = times.arrived if times.load_started is None else times.load_started
            attributes = shared | {"loraplex.adapter.id": times.adapter}
            self._close(self._add("adapter_load", started, times.ended, attributes), times.ended, is_open=True)

    def _add(self, name: str, started: float, ended: float, attributes: Attributes) -> Span:
        started = max(min(started, ended), self._trace.started)
        return self._tracer.start_span(name, self._context, attributes=attributes, start_time=self._ns(started))

    def _close(self, span: Span, ended: float, *, is_open: bool = False) -> None:
        """End a span; one that is open ends because its request failed or was given up."""
        if is_open:
            outcome = self._record.generation.outcome
            span.set_attribute("loraplex.outcome", outcome)
            if outcome == "failed":
                span.set_attribute("error.type", self._trace.error_type or "server_error")
                span.set_status(StatusCode.ERROR)
        span.end(self._ns(max(ended, self._trace.started)))

    def _preempted(self, span: Span, times: list[float]) -> None:
        for at in times:
            span.add_event("preempted", timestamp=self._ns(at))

    def _ns(self, seconds: float) -> int:
        return self._epoch + round(seconds * 1e9)
