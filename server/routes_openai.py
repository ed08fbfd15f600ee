"""The OpenAI routes: models, completions, chat completions."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
import structlog
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from loraplex.server.adapter_choice import AdapterChooser
from loraplex.server.adapter_registry import RegisteredAdapter
from loraplex.server.answer import AnswerShape, UsageChunks, head_of, streamed_answer, whole_answer
from loraplex.server.chat_answer import ChatShape
from loraplex.server.completion_answer import CompletionShape
from loraplex.server.edge import Edge
from loraplex.server.errors import LoraplexError, ModelNotFoundError
from loraplex.server.field_rules import refuse_unserved, unknown_fields
from loraplex.server.generation import Generation
from loraplex.server.generation_job import Job, Target
from loraplex.server.generation_record import GenerationRecord
from loraplex.server.http_errors import error_body, public_error, traceback_of
from loraplex.server.lifecycle import check_ready
from loraplex.server.request_body import body_schema, read_body
from loraplex.server.request_timing import RequestTiming
from loraplex.server.request_trace import RequestTrace, trace_of
from loraplex.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from loraplex.server.slo_hints import slo_hints
from loraplex.server.sse import EventStream, until_disconnect
from loraplex.server.tenants import DEFAULT_TENANT

IGNORED_HEADER = "x-loraplex-ignored-params"
Limit = Annotated[int | None, Query(ge=1)]
After = Annotated[str | None, Query()]


def openai_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["openai"])
    answers = Answers(edge)

    @router.get("/v1/models")
    async def list_models(limit: Limit = None, after: After = None) -> Response:
        return Response(orjson.dumps(model_list(edge, limit, after)), media_type="application/json")

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        return model_named(edge, model_id)

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        return await answers.completion(request, await read_body(request, CompletionRequest))

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        return await answers.chat(request, await read_body(request, ChatCompletionRequest))

    return router


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that may go on: what it runs on, and which of its fields have no effect."""

    target: Target
    ignored: list[str]


class Answers:
    """Answers generation requests."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._adapters = AdapterChooser(edge.registry, edge.config.max_mix_adapters)
        self._log = structlog.get_logger()

    async def chat(self, request: Request, body: ChatCompletionRequest) -> Response:
        """``POST /v1/chat/completions``."""
        admitted = self._admit(body)
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        job = await self._edge.jobs.chat(body, answer_id, admitted.target)
        shape = ChatShape(
            vocabulary=self._edge.tokenizer.vocabulary,
            with_logprobs=job.wants_logprobs,
            with_routing=job.wants_routing,
        )
        return await self._answer(request, body, answer_id, job, shape, admitted)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """``POST /v1/completions``."""
        admitted = self._admit(body)
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        job = await self._edge.jobs.completion(body, answer_id, admitted.target)
        shape = CompletionShape(
            vocabulary=self._edge.tokenizer.vocabulary,
            with_logprobs=job.wants_logprobs,
            with_routing=job.wants_routing,
        )
        return await self._answer(request, body, answer_id, job, shape, admitted)

    def _admit(self, body: GenerationRequest) -> Admitted:
        """Checks all that needs no tokens."""
        refuse_unserved(body.extra)
        ignored = unknown_fields(body.extra, strict=self._edge.config.strict_requests)
        if body.store:
            ignored.append("store")
        if body.stream_options is not None and not body.stream:
            ignored.append("stream_options")
        chosen = self._adapters.choose(body)
        if names := [part.adapter.name for part in chosen.parts]:
            structlog.contextvars.bind_contextvars(adapter=names[0] if len(names) == 1 else names)
        check_ready(self._edge.engine)
        return Admitted(target=Target(info=self._edge.engine.info, chosen=chosen), ignored=ignored)

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        answer_id: str,
        job: Job,
        shape: AnswerShape,
        admitted: Admitted,
    ) -> Response:
        edge, trace = self._edge, trace_of(request.scope)
        timing = RequestTiming(started=trace.started)
        tenant = edge.metrics.tenants[trace.tenant or DEFAULT_TENANT]
        hints = slo_hints(request.headers)
        asked = job.asked_for(trace.request_id, hints.first_token if edge.config.slo_order else None)
        generation = Generation(asked, edge.engine, edge.tokenizer, edge.metrics, timing, tenant, hints)
        head = head_of(body, answer_id, edge.config.model_name, admitted.target)
        parts = admitted.target.chosen.parts
        trace.generation = GenerationRecord(
            operation="chat" if isinstance(body, ChatCompletionRequest) else "text_completion",
            model=head.model,
            base_name=edge.config.model_name,
            answer_id=answer_id,
            adapters=[part.adapter.name for part in parts],
            weights=[part.weight for part in parts],
            stream=bool(body.stream),
            generation=generation,
        )
        headers = self._headers(admitted.ignored)
        if not body.stream:
            answer = await until_disconnect(request.receive, whole_answer(generation, head, shape))
            return Response(orjson.dumps(answer), headers=headers, media_type="application/json")
        return EventStream(
            streamed_answer(generation, head, shape, _usage_chunks(body)),
            describe_error=lambda error: self._describe(error, trace),
            ping_seconds=edge.config.ping_seconds,
            headers=headers,
        )

    def _headers(self, ignored: list[str]) -> dict[str, str]:
        if not ignored:
            return {}
        self._log.debug("ignored_fields", fields=ignored)
        return {IGNORED_HEADER: ", ".join(ignored)}

    def _describe(self, error: BaseException, trace: RequestTrace) -> dict[str, Any]:
        """The last event of a stream that failed."""
        public = public_error(error)
        trace.error_type = public.type
        if isinstance(error, Exception) and not isinstance(error, LoraplexError):
            self._log.error("stream_failed", exception=traceback_of(error))
        return error_body(public)


def _usage_chunks(body: GenerationRequest) -> UsageChunks:
    options = body.stream_options
    if options is None:
        return UsageChunks()
    return UsageChunks(at_end=bool(options.include_usage), always=bool(options.continuous_usage_stats))


def model_list(edge: Edge, limit: int | None, after: str | None) -> dict[str, Any]:
    """``GET /v1/models``: the base model, then the adapters in order of their names."""
    first = [] if after is not None else [_base_model(edge)]
    cursor = None if after == edge.config.model_name else after
    room = None if limit is None else limit - len(first)
    adapters, has_more = edge.registry.listed(after=cursor, limit=room)
    return {
        "object": "list",
        "data": first + [_adapter_model(edge, adapter) for adapter in adapters],
        "has_more": has_more,
    }


def model_named(edge: Edge, name: str) -> dict[str, Any]:
    """``GET /v1/models/{id}``."""
    if name == edge.config.model_name:
        return _base_model(edge)
    adapter = edge.registry.resolve(name) if name else None
    if adapter is None:
        raise ModelNotFoundError("The model '' does not exist; GET /v1/models lists what is served.", param="model")
    return _adapter_model(edge, adapter) | {"id": name}


def _base_model(edge: Edge) -> dict[str, Any]:
    root = edge.engine.info.model_path if edge.engine.state == "ready" else None
    return _model(edge, edge.config.model_name, edge.registry.created, root=root, parent=None)


def _adapter_model(edge: Edge, adapter: RegisteredAdapter) -> dict[str, Any]:
    """An adapter as a model. Its kind and number of experts are null until a load over HTTP has read it."""
    ref, info = adapter.ref, adapter.info
    model = _model(edge, ref.name, adapter.created, root=ref.path, parent=edge.config.model_name)
    return model | {"kind": info and info.kind, "num_experts": None if info is None else info.num_experts}


def _model(edge: Edge, name: str, created: int, *, root: str | None, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root or name,
        "parent": parent,
        "max_model_len": edge.engine.info.max_model_len if edge.engine.state == "ready" else None,
    }
