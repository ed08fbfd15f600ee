"""Tells load balancers how busy this server is in the header of an answer (ORCA), where they ask for it."""

from __future__ import annotations

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.engine_client import EngineClient
from loraplex.server.messages import EngineStats
from loraplex.server.vllm_metrics import usage

ASKED = "endpoint-load-metrics-format"
TOLD = "endpoint-load-metrics"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class LoadReport:
    """Adds ``endpoint-load-metrics`` to answers of generation requests whose client names a format.

    Formats are ``text`` and ``json``, in any case; others are ignored. The numbers are those of the engine's last
    snapshot when the answer begins.
    """

    def __init__(self, app: ASGIApp, *, engine: EngineClient) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope).get(ASKED, "").lower() if _is_generation(scope) else ""
        if wanted not in {"text", "json"}:
            await self._app(scope, receive, send)
            return

        async def send_reported(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                MutableHeaders(scope=message)[TOLD] = load_report(self._engine.stats, wanted)
            await send(message)

        await self._app(scope, receive, send_reported)


def load_report(stats: EngineStats, wanted: str) -> str:
    """The header's value in a format, "text" or "json", as vLLM writes it."""
    numbers = {"kv_cache_usage_perc": usage(stats), "num_requests_waiting": float(stats.waiting)}
    if wanted == "json":
        return "JSON " + orjson.dumps({"named_metrics": numbers}).decode()
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in numbers.items())


def _is_generation(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] in PATHS
