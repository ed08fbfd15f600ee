"""What the HTTP edge needs to know of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraplex.server.tenants import TenantKey

MetricsCompat = Literal["none", "vllm"]
"""Whose names the metrics have beside their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Limits and names of the HTTP edge.

    Args:
        model_name: the name under which the base model is served.
        api_keys: accepted bearer tokens without a name; no key at all means open to all.
        tenant_keys: accepted bearer tokens with the name of their tenant.
        max_body_bytes: a larger request body is a 413.
        adapter_roots: folders below which ``lora_path`` must lie; none means any folder.
        adapter_sources: beginnings of addresses that adapters may be loaded from; none means no remote source.
        max_adapter_bytes: a larger upload is a 413, packed or unpacked; ``max_body_bytes`` is not for uploads.
        max_uploads: at once; one more is a 429.
        stream_interval: tokens of a choice per streamed event; its first token never waits.
        strict_requests: refuse unknown request fields instead of naming them in a response header.
        drain_seconds: how long open streams may go on after the server was told to stop.
        max_n: the most choices per prompt.
        max_logprobs: the most alternatives per token.
        max_choices: the most choices in one body, all its prompts together.
        max_mix_adapters: the most adapters in one weighted list.
        max_routing_tokens: the most tokens whose routes one answer tells.
        max_adapter_series: the most adapters that the metrics tell of by name.
        slo_order: whether hopes for the first token order those who wait.
        metrics_compat: whose names the metrics have beside their own.
        metrics_share: the most of the event loop's time that writing metrics may take; scrapes in between are given
            the last page.
        ping_seconds: a stream that was silent for so long gets a comment.
        access_log: whether to log a line for each request.
    """

    model_name: str
    api_keys: frozenset[str] = frozenset()
    tenant_keys: tuple[TenantKey, ...] = ()
    max_body_bytes: int = 32 * 1024 * 1024
    adapter_roots: tuple[Path, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    max_adapter_bytes: int = 2 << 30
    max_uploads: int = 8
    stream_interval: int = 1
    strict_requests: bool = False
    drain_seconds: float = 30.0
    max_n: int = 128
    max_logprobs: int = 20
    max_choices: int = 2048
    max_mix_adapters: int = 8
    max_routing_tokens: int = 4096
    max_adapter_series: int = 100
    slo_order: bool = True
    metrics_compat: MetricsCompat = "none"
    metrics_share: float = 0.05
    ping_seconds: float = 15.0
    access_log: bool = True
