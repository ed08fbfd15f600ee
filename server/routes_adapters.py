"""Adapter administration: our own routes, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse

from loraplex.server.adapter_admin import AdapterAdmin
from loraplex.server.adapter_registry import RegisteredAdapter
from loraplex.server.edge import Edge
from loraplex.server.errors import ModelNotFoundError
from loraplex.server.messages import AdapterInfo
from loraplex.server.request_body import body_schema, read_body
from loraplex.server.schemas import LoadLoraRequest, RegisterAdapterRequest, UnloadLoraRequest

Limit = Annotated[int | None, Query(ge=1)]
After = Annotated[str | None, Query()]
Infos = dict[tuple[str, str], AdapterInfo]


def adapter_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["adapters"])
    admin = AdapterAdmin(edge.engine, edge.registry, edge.config.adapter_roots)

    @router.get("/v1/adapters")
    async def list_adapters(limit: Limit = None, after: After = None) -> dict[str, Any]:
        infos = await _engine_infos(edge)
        adapters, has_more = edge.registry.listed(after=after, limit=limit)
        return {"object": "list", "data": [_adapter(edge, one, infos) for one in adapters], "has_more": has_more}

    @router.get("/v1/adapters/{adapter_id:path}")
    async def get_adapter(adapter_id: str) -> dict[str, Any]:
        adapter = edge.registry.get(adapter_id)
        if adapter is None:
            raise ModelNotFoundError(f"The adapter '{adapter_id[:256]}' does not exist.", param="adapter_id")
        return _adapter(edge, adapter, await _engine_infos(edge))

    @router.post("/v1/adapters", openapi_extra=body_schema(RegisterAdapterRequest))
    async def register_adapter(request: Request) -> dict[str, Any]:
        body = await read_body(request, RegisterAdapterRequest)
        adapter = await admin.load(body.id, body.path, replace=False, params=("id", "path"))
        return _adapter(edge, adapter, await _engine_infos(edge))

    @router.delete("/v1/adapters/{adapter_id:path}")
    async def delete_adapter(adapter_id: str) -> dict[str, Any]:
        await admin.unload(adapter_id, "adapter_id")
        return {"id": adapter_id, "object": "adapter", "deleted": True}

    @router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadLoraRequest))
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, LoadLoraRequest)
        params = ("lora_name", "lora_path")
        await admin.load(body.lora_name, body.lora_path, replace=bool(body.load_inplace), params=params)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadLoraRequest))
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, UnloadLoraRequest)
        await admin.unload(body.lora_name, "lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


async def _engine_infos(edge: Edge) -> Infos:
    """What the engine knows, by name and path; nothing while there is no engine."""
    if edge.engine.state != "ready":
        return {}
    return {(info.name, info.path): info for info in await edge.engine.list_adapters()}


def _adapter(edge: Edge, adapter: RegisteredAdapter, infos: Infos) -> dict[str, Any]:
    """An adapter as the API shows it. What is not known before the first use is null."""
    ref = adapter.ref
    now = infos.get((ref.name, ref.path))
    info = now or adapter.info
    return {
        "id": ref.name,
        "object": "adapter",
        "name": ref.name,
        "path": ref.path,
        "parent": edge.config.model_name,
        "created": adapter.created,
        "revision": ref.revision,
        "tier": now.tier if now else "disk",
        "identity": info and info.identity,
        "kind": info and info.kind,
        "rank": info and info.rank,
        "num_experts": info and info.num_experts,
        "targets": info and info.targets,
        "bytes": info and info.bytes,
        "pages": info and info.pages,
        "running": now.running if now else 0,
        "warnings": info.warnings if info else [],
    }
