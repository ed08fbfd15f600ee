"""Adapter administration: our own routes. What other servers' scripts ask for is in ``routes_adapter_aliases.py``."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from loraplex.server.adapter_admin import Wishes
from loraplex.server.adapter_card import AdapterFilter, KindName, adapter_card
from loraplex.server.adapter_registry import RegisteredAdapter, check_tags
from loraplex.server.adapter_view import Phase
from loraplex.server.edge import Edge
from loraplex.server.errors import InvalidRequestError
from loraplex.server.messages import AdapterTier
from loraplex.server.request_body import body_schema, parse_body, read_body
from loraplex.server.request_uploads import is_upload, upload_schema
from loraplex.server.schemas import ChangeAdapterRequest, PrefetchAdapterRequest, RegisterAdapterRequest

PAGE = 1000
"""Adapters of a list that names no limit."""

Limit = Annotated[int, Query(ge=1, le=10_000)]
Text = Annotated[str | None, Query(max_length=256)]


def adapter_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["adapters"])
    admin = edge.admin

    @router.get("/v1/adapters")
    async def list_adapters(
        limit: Limit = PAGE,
        after: Text = None,
        prefix: Text = None,
        state: Phase | None = None,
        tier: AdapterTier | None = None,
        kind: KindName | None = None,
        tag: Text = None,
        pinned: bool | None = None,
    ) -> Response:
        asked = AdapterFilter(state=state, tier=tier, kind=kind, tag=tag, pinned=pinned)
        adapters, has_more = edge.registry.listed(
            after=after, limit=limit, prefix=prefix or "", accept=asked.accept(edge.engine)
        )
        return _json({"object": "list", "data": [_card(edge, one) for one in adapters], "has_more": has_more})

    @router.get("/v1/adapters/{adapter_id:path}")
    async def get_adapter(adapter_id: str) -> Response:
        return _json(_card(edge, edge.registry.named(adapter_id, "adapter_id")))

    @router.post("/v1/adapters", openapi_extra=upload_schema(RegisterAdapterRequest))
    async def register_adapter(request: Request) -> Response:
        if is_upload(request.scope):
            return _json(_card(edge, await edge.uploads.receive(request)))
        body = await read_body(request, RegisterAdapterRequest)
        adapter = await admin.load(
            body.id,
            body.path,
            replace=bool(body.replace),
            params=("id", "path"),
            wishes=_wishes(body.pinned, body.tags),
        )
        return _json(_card(edge, adapter))

    @router.patch("/v1/adapters/{adapter_id:path}", openapi_extra=body_schema(ChangeAdapterRequest))
    async def change_adapter(adapter_id: str, request: Request) -> Response:
        body = await read_body(request, ChangeAdapterRequest)
        adapter = await admin.change(adapter_id, _wishes(body.pinned, body.tags), body.path)
        return _json(_card(edge, adapter))

    @router.delete("/v1/adapters/{adapter_id:path}")
    async def delete_adapter(adapter_id: str, delete_files: bool | None = None) -> Response:
        known = edge.registry.named(adapter_id, "adapter_id")
        if delete_files and known.origin != "upload":
            raise InvalidRequestError(
                "'delete_files' is true, but only files that were uploaded are ever deleted.", param="delete_files"
            )
        if delete_files is False and known.origin == "upload":
            await edge.uploads.keep(known)
        await admin.unload(adapter_id, "adapter_id")
        return _json({"id": adapter_id, "object": "adapter", "deleted": True})

    @router.post("/v1/adapters/{adapter_id}/pin")
    async def pin_adapter(adapter_id: str) -> Response:
        return _json(_card(edge, await admin.change(adapter_id, Wishes(pinned=True))))

    @router.post("/v1/adapters/{adapter_id}/unpin")
    async def unpin_adapter(adapter_id: str) -> Response:
        return _json(_card(edge, await admin.change(adapter_id, Wishes(pinned=False))))

    @router.post("/v1/adapters/{adapter_id}/prefetch", openapi_extra=body_schema(PrefetchAdapterRequest))
    async def prefetch_adapter(adapter_id: str, request: Request) -> Response:
        body = parse_body(await request.body() or b"{}", PrefetchAdapterRequest)
        return _json(_card(edge, await admin.prefetch(adapter_id, body.tier or "pool")))

    return router


def _wishes(pinned: bool | None, tags: list[str] | None) -> Wishes:
    return Wishes(pinned=pinned, tags=None if tags is None else check_tags(tags))


def _card(edge: Edge, adapter: RegisteredAdapter) -> dict[str, Any]:
    return adapter_card(edge.engine, edge.config.model_name, adapter)


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
