"""All that the routes share, put together once in ``create_app``."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.adapter_admin import AdapterAdmin
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_uploads import AdapterUploads
from loraplex.server.engine_client import EngineClient
from loraplex.server.generation_job import JobMaker
from loraplex.server.http_config import HttpConfig
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.metrics import ServerMetrics
from loraplex.server.tokens import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """The HTTP edge of one server."""

    config: HttpConfig
    engine: EngineClient
    registry: AdapterRegistry
    admin: AdapterAdmin
    uploads: AdapterUploads
    tokenizer: TextTokenizer
    lifecycle: Lifecycle
    metrics: ServerMetrics
    jobs: JobMaker
