"""Adapter administration as scripts for other servers ask for it: vLLM's routes, SGLang's, and SageMaker's."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from loraplex.server.adapter_admin import Wishes
from loraplex.server.edge import Edge
from loraplex.server.errors import LoraplexError
from loraplex.server.http_errors import error_headers
from loraplex.server.request_body import body_schema, read_body
from loraplex.server.request_trace import trace_of
from loraplex.server.schemas import LoadLoraRequest, SageMakerAdapterRequest, UnloadLoraRequest

MAX_LOADED_SHOWN = 1000
LORA_PARAMS = ("lora_name", "lora_path")


def adapter_alias_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["adapters"])

    @router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadLoraRequest))
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, LoadLoraRequest)
        await _load(edge, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadLoraRequest))
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, UnloadLoraRequest)
        await edge.admin.unload(body.lora_name, "lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.post("/load_lora_adapter", openapi_extra=body_schema(LoadLoraRequest))
    async def sglang_load(request: Request) -> Response:
        try:
            await _load(edge, await read_body(request, LoadLoraRequest))
        except LoraplexError as error:
            return _sglang_failure(edge, request, error)
        return _sglang_answer(edge, None)

    @router.post("/unload_lora_adapter", openapi_extra=body_schema(UnloadLoraRequest))
    async def sglang_unload(request: Request) -> Response:
        try:
            await edge.admin.unload((await read_body(request, UnloadLoraRequest)).lora_name, "lora_name")
        except LoraplexError as error:
            return _sglang_failure(edge, request, error)
        return _sglang_answer(edge, None)

    @router.post("/adapters", openapi_extra=body_schema(SageMakerAdapterRequest))
    async def sagemaker_load(request: Request) -> PlainTextResponse:
        body = await read_body(request, SageMakerAdapterRequest)
        await edge.admin.load(body.name, body.src, replace=False, params=("name", "src"))
        return PlainTextResponse(f"Success: adapter '{body.name}' added successfully.")

    @router.delete("/adapters/{name:path}")
    async def sagemaker_unload(name: str) -> PlainTextResponse:
        await edge.admin.unload(name, "name")
        return PlainTextResponse(f"Success: adapter '{name}' removed successfully.")

    return router


async def _load(edge: Edge, body: LoadLoraRequest) -> None:
    wishes = Wishes(pinned=body.pinned)
    replace = bool(body.load_inplace)
    await edge.admin.load(body.lora_name, body.lora_path, replace=replace, params=LORA_PARAMS, wishes=wishes)


def _sglang_failure(edge: Edge, request: Request, error: LoraplexError) -> Response:
    trace_of(request.scope).error_type = error.type
    return _sglang_answer(edge, error)


def _sglang_answer(edge: Edge, error: LoraplexError | None) -> Response:
    """SGLang's answer; of many adapters the first ones are told."""
    adapters, _ = edge.registry.listed(limit=MAX_LOADED_SHOWN)
    body: dict[str, Any] = {
        "success": error is None,
        "error_message": None if error is None else error.message,
        "loaded_adapters": {one.ref.name: one.ref.path for one in adapters},
    }
    headers = {} if error is None else error_headers(error)
    status = 200 if error is None else error.status
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
