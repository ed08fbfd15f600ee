"""What the engine process is told at its start."""

from __future__ import annotations

from typing import Literal

import msgspec

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
AttentionName = Literal["auto", "triton", "flashinfer"]
KernelsName = Literal["auto", "triton", "plain"]
EvictionName = Literal["value", "lru"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine needs besides requests. Sizes are bytes, times seconds; see ``settings.py`` for each."""

    model: str
    model_name: str | None = None
    dtype: DtypeName = "auto"
    device: DeviceName = "auto"
    kernels: KernelsName = "auto"
    attention: AttentionName = "auto"
    graphs: bool = True
    graph_rank: int = 16
    pool_bytes: int | None = None
    memory_fraction: float | None = None
    host_adapter_bytes: int = 4 << 30
    page_tokens: int = 16
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 4096
    prefill_chunk: int = 512
    threads: int | None = None
    loader_threads: int | None = None
    allow_bin: bool = False
    poison_freed_pages: bool = False
    prefix_caching: bool = True
    cache_dir: str | None = None
    disk_cache_bytes: int = 20 << 30
    remote_timeout_seconds: float = 60.0
    eviction: EvictionName = "value"
    max_pinned_fraction: float = 0.5
    prefetch: bool = True
    expert_metrics: int = 0
    stats_interval: float = 0.1


class EngineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What stands on standard input: the engine's configuration, and where its sockets are."""

    config: EngineConfig
    commands: str
    events: str
    log_level: str = "info"
    log_format: str = "console"
