"""Puts an engine together from its configuration: reads the model, sizes the pool, wires the parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from loraplex.kernels.attention_plan import AttentionPlanner
from loraplex.kernels.dense_linear import has_fast_bfloat16
from loraplex.kernels.devices import has_kernels_for, uses_triton
from loraplex.memory.arena import PageShape, allocate_arena, page_shape, poison
from loraplex.memory.budget import available_bytes, count_pages
from loraplex.memory.kv_cache import KvCache
from loraplex.server.adapter_calls import AdapterCalls
from loraplex.server.adapter_reports import AdapterReports
from loraplex.server.base_matrices import BaseMatrices
from loraplex.server.batch import BatchMaker
from loraplex.server.checkpoint import find_checkpoint, read_config
from loraplex.server.cores import usable_cores
from loraplex.server.decoder import Decoder
from loraplex.server.device_build import build_device_runner
from loraplex.server.device_runner import DeviceRunner
from loraplex.server.engine import Engine, EngineParts, StepRunner
from loraplex.server.engine_config import EngineConfig
from loraplex.server.errors import EngineStartError
from loraplex.server.messages import EngineInfo
from loraplex.server.model_runner import ModelRunner
from loraplex.server.prefetch_history import HistoryPrefetch
from loraplex.server.progress import Progress
from loraplex.server.routing_report import ExpertCounts
from loraplex.server.scheduler import Scheduler
from loraplex.server.scheduler_config import MAX_PREFETCHES, SchedulerConfig
from loraplex.server.step_memory import POOL_FRACTION, step_bytes
from loraplex.server.tiers_build import Tiers, build_tiers
from loraplex.server.traits import ModelTraits, read_traits
from loraplex.server.weights import CheckpointReader, DecoderWeights, load_weights


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one and kernels for it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and has_kernels_for("cuda") else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineStartError("device is 'cuda', but no CUDA device is available; use 'cpu' or 'auto'", param="device")
    return torch.device(name)


def choose_dtype(name: str, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's dtype, but float32 on a CPU that has no fast product for it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    wanted = checkpoint or torch.float32
    if device.type == "cpu" and not (wanted == torch.bfloat16 and has_fast_bfloat16()):
        return torch.float32
    return wanted


def build_engine(
    config: EngineConfig, *, progress: Progress | None = None, on_change: Callable[[], None] | None = None
) -> Engine:
    """Read the model and make an engine ready to serve.

    Args:
        config: what to serve and within which limits.
        progress: told of the weights read.
        on_change: called from a loader thread when an adapter has been read.

    Raises:
        LoraplexError: the model or the settings cannot be served; the message says why.
    """
    torch.set_num_threads(config.threads or usable_cores())
    folder = find_checkpoint(config.model)
    hf_config = read_config(folder)
    traits = read_traits(hf_config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, traits.torch_dtype, device)
    reader = CheckpointReader(folder, progress)
    weights = load_weights(reader, traits, dtype, device)
    shape = page_shape(traits.num_layers, traits.kv_size, config.page_tokens, dtype)
    num_pages = _count_pages(config, traits, shape, device)
    info = EngineInfo(
        model_path=str(folder),
        architecture=traits.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=traits.vocab_size,
        max_model_len=_max_model_len(config, traits),
        num_pages=num_pages,
        page_tokens=shape.page_tokens,
        page_bytes=shape.page_bytes,
        num_parameters=weights.num_parameters,
    )
    parts = _wire(config, info, traits, weights, shape, device, _eos_ids(folder, hf_config), on_change)
    return Engine(parts, config.stats_interval)


def _wire(
    config: EngineConfig,
    info: EngineInfo,
    traits: ModelTraits,
    weights: DecoderWeights,
    shape: PageShape,
    device: torch.device,
    eos_ids: frozenset[int],
    on_change: Callable[[], None] | None,
) -> EngineParts:
    arena = allocate_arena(shape, info.num_pages, device)
    if config.poison_freed_pages:
        poison(arena, range(info.num_pages))
    tiers = build_tiers(
        config,
        traits.base_shape,
        BaseMatrices(Path(info.model_path), traits, shape.dtype),
        shape,
        info.num_pages,
        pin_memory=device.type == "cuda",
        on_release=partial(poison, arena) if config.poison_freed_pages else None,
        on_change=on_change,
    )
    limits = SchedulerConfig(
        max_model_len=info.max_model_len,
        eos_token_ids=eos_ids,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        prefill_chunk=config.prefill_chunk,
        prefix_caching=config.prefix_caching,
        max_prefetches=MAX_PREFETCHES if config.prefetch else 0,
    )
    runner = _build_runner(config, info, traits, weights, shape, arena, tiers.kv)
    tiers.costs.transfers = runner.transfers
    return engine_parts(info, tiers, limits, runner, config)


def engine_parts(
    info: EngineInfo, tiers: Tiers, limits: SchedulerConfig, runner: StepRunner, config: EngineConfig
) -> EngineParts:
    """Put a scheduler over the tiers, and what serves the engine's clients over both."""
    pool, kv, adapters, directory = tiers.pool, tiers.kv, tiers.adapters, tiers.directory

    def note_arrival(identity: str) -> None:
        tiers.pool_rates.note(identity)
        tiers.rates.note(identity)

    scheduler = Scheduler(limits, pool, kv, adapters, directory, note_arrival=note_arrival)
    calls = AdapterCalls(
        directory, scheduler.prefetcher, int(config.max_pinned_fraction * pool.num_pages), scheduler.num_open_under
    )
    history = HistoryPrefetch(tiers.rates, directory, tiers.store, pool, adapters, scheduler.prefetcher)
    return EngineParts(
        info=info,
        pool=pool,
        kv=kv,
        adapters=adapters,
        store=tiers.store,
        directory=directory,
        scheduler=scheduler,
        runner=runner,
        calls=calls,
        reports=AdapterReports(directory, tiers.store, adapters, calls, info.page_bytes),
        costs=tiers.costs,
        history=history if config.prefetch else None,
        cache=tiers.cache,
    )


def _build_runner(
    config: EngineConfig,
    info: EngineInfo,
    traits: ModelTraits,
    weights: DecoderWeights,
    shape: PageShape,
    arena: torch.Tensor,
    kv: KvCache,
) -> ModelRunner | DeviceRunner:
    counts = ExpertCounts(config.expert_metrics) if config.expert_metrics else None
    if _uses_triton(config, arena.device):
        try:
            return build_device_runner(config, info, traits, weights, shape, arena, kv, counts)
        except ValueError as error:
            raise EngineStartError(str(error), param="attention") from error
    if config.attention == "flashinfer":
        raise EngineStartError(
            f"attention is 'flashinfer', which runs on CUDA beside the Triton kernels; the device is {arena.device}",
            param="attention",
        )
    decoder = Decoder(traits, weights)
    planner = AttentionPlanner(shape.page_tokens, tuple(dict.fromkeys(traits.windows)), shape.dtype, arena.device)
    batches = BatchMaker(planner, kv, decoder.embedding_group, arena.device, logs_routes=counts is not None)
    return ModelRunner(decoder, arena, batches, counts)


def _uses_triton(config: EngineConfig, device: torch.device) -> bool:
    try:
        return uses_triton(config.kernels, device.type)
    except ValueError as error:
        raise EngineStartError(str(error), param="kernels") from None


def _count_pages(config: EngineConfig, traits: ModelTraits, shape: PageShape, device: torch.device) -> int:
    is_cuda = device.type == "cuda"
    try:
        return count_pages(
            pool_bytes=config.pool_bytes,
            memory_fraction=config.memory_fraction or POOL_FRACTION[device.type],
            available=available_bytes(device),
            page_bytes=shape.page_bytes,
            step_bytes=step_bytes(config, traits, shape.dtype) if is_cuda else 0,
        )
    except ValueError as error:
        raise EngineStartError(str(error), param="pool_bytes") from error


def _max_model_len(config: EngineConfig, traits: ModelTraits) -> int:
    if config.max_model_len is None:
        return traits.max_positions
    if config.max_model_len > traits.max_positions:
        raise EngineStartError(
            f"max_model_len is {config.max_model_len}, but the model's context is {traits.max_positions}",
            param="max_model_len",
        )
    return config.max_model_len


def _eos_ids(folder: Path, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end a text: the generation configuration's, else the model configuration's."""
    found = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
