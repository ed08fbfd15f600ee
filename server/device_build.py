"""Puts together what runs steps on a device by kernels of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from loraplex.kernels.adapter_table import AdapterTable, TableCapacity
from loraplex.kernels.flashinfer_attention import FlashInferAttention, allocate_workspace, choose_attention
from loraplex.kernels.lora_rows import CHUNK
from loraplex.kernels.paged_attention import PagedAttention
from loraplex.kernels.paged_prefill import tile_queries
from loraplex.memory.arena import PageShape
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.transfer import TransferStats
from loraplex.server.decoder import Decoder, heads_of, rotary_of
from loraplex.server.device_batch import DeviceBatchMaker
from loraplex.server.device_capacities import ShapeLimits
from loraplex.server.device_program import Machine
from loraplex.server.device_runner import DeviceLimits, DeviceRunner
from loraplex.server.engine_config import EngineConfig
from loraplex.server.messages import EngineInfo
from loraplex.server.routing_report import ExpertCounts
from loraplex.server.traits import ModelTraits
from loraplex.server.weights import DecoderWeights

_GRAPH_PROMPT_ROWS = 1024
"""Steps with prompts of more rows take the device longer than the host takes to launch them."""


def build_device_runner(
    config: EngineConfig,
    info: EngineInfo,
    traits: ModelTraits,
    weights: DecoderWeights,
    shape: PageShape,
    arena: torch.Tensor,
    kv: KvCache,
    expert_counts: ExpertCounts | None,
) -> DeviceRunner:
    """A runner over the kernels for GPUs, on the arena's device.

    Raises:
        ValueError: the setting ``attention`` cannot be met; the message says why.
    """
    device = arena.device
    attention = PagedAttention(heads_of(traits), rotary_of(traits), info.max_model_len, device)
    decoder = Decoder(traits, weights, attention)
    table = AdapterTable(
        decoder.layer_groups,
        decoder.model_groups,
        num_layers=traits.num_layers,
        page_chunks=shape.page_elems // CHUNK,
        device=device,
        # A table that grows makes captured graphs useless.
        capacity=TableCapacity(units=4096, records=16_384, pages=max(4096, info.num_pages)),
        expected_rank=config.graph_rank,
    )
    windows = tuple(dict.fromkeys(traits.windows))
    max_pages = kv.pages_for(info.max_model_len)
    machine = Machine(
        decoder,
        arena,
        table,
        torch.zeros((2 * config.max_running + 1, max_pages), dtype=torch.int32, device=device),
        torch.zeros(config.max_running, dtype=torch.int64, device=device),
        torch.cuda.Stream(device) if device.type == "cuda" else None,
        _flashinfer(config, traits, shape, windows, max_pages, device),
    )
    prompt_tile = tile_queries(traits.num_heads, traits.num_kv_heads, traits.head_dim, shape.dtype)
    batches = DeviceBatchMaker(
        kv,
        table,
        windows,
        max_sequences=config.max_running,
        max_pages=max_pages,
        prompt_tile=prompt_tile,
        logs_routes=expert_counts is not None,
    )
    shapes = ShapeLimits(info.num_pages * shape.page_tokens, config.max_running, prompt_tile, windows)
    limits = DeviceLimits(
        shapes=shapes,
        graph_rows=config.max_running if config.graphs else 0,
        graph_prompt_rows=_GRAPH_PROMPT_ROWS if config.graphs else 0,
    )
    runner = DeviceRunner(machine, batches, TransferStats(), limits, expert_counts)
    if device.type == "cuda":
        runner.prepare()
    return runner


def _flashinfer(
    config: EngineConfig,
    traits: ModelTraits,
    shape: PageShape,
    windows: tuple[int | None, ...],
    max_pages: int,
    device: torch.device,
) -> Callable[[int], FlashInferAttention] | None:
    """Makes FlashInfer's kernels for steps of so many rows, where the settings ask for them.

    Raises:
        ValueError: FlashInfer is asked for and cannot be used; the message says why.
    """
    if choose_attention(config.attention, device) != "flashinfer":
        return None
    workspace = allocate_workspace(device)

    def make(rows: int) -> FlashInferAttention:
        return FlashInferAttention(
            heads_of(traits),
            shape.page_tokens,
            windows,
            shape.dtype,
            workspace,
            graph_rows=rows,
            graph_pages=rows * max_pages,
        )

    # Graphs of so many rows share them: each replay follows a plan, and none runs beside another.
    return cache(make)
