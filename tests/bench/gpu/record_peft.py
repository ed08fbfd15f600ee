"""transformers + PEFT on the same device with the same base weights: decode steps beside this engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import random_adapters
import torch
from context import Context
from costs import decode_work
from record import Record, missing
from timing import interleaved, seconds
from transformers import DynamicCache

try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    LoraConfig = get_peft_model = None

RANK = 16
_SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(context: Context) -> Iterator[Record]:
    """For batches of 1 and 16: transformers without adapters, with one, and with one for each row."""
    if get_peft_model is None:
        yield missing("transformers + PEFT decode step", "peft is not installed")
        return
    model = context.base.transformers_model()
    batches = sorted({1, min(16, max(context.scale.batches))})
    for batch in batches:
        yield _record(context, f"transformers, base, batch {batch}", _step(context, model, batch, {}))
    count = batches[-1]
    peft = _with_adapters(model, count)
    for batch in batches:
        took = _step(context, peft, batch, {})
        yield _record(context, f"transformers + PEFT, one r{RANK} adapter, batch {batch}", took)
    if count > 1:
        yield _mixed(context, peft, count)
    del peft, model
    yield from _ours(context, batches)


def _with_adapters(model: Any, count: int) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_SITES, init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for index in range(1, count):
        peft.add_adapter(str(index), config)
    base = next(iter(model.parameters()))
    return peft.to(base.device, base.dtype).eval()


def _mixed(context: Context, peft: Any, count: int) -> Record:
    name = f"transformers + PEFT, {count} r{RANK} adapters by adapter_names, batch {count}"
    try:
        took = _step(context, peft, count, {"adapter_names": [str(index) for index in range(count)]})
    except (TypeError, ValueError, RuntimeError) as error:
        return missing(name, f"{type(error).__name__}: {str(error)[:80]}")
    return _record(context, name, took, count)


def _step(context: Context, model: Any, batch: int, options: dict[str, Any]) -> float:
    """Median seconds of one decode step over random keys and values."""
    shape, length = context.shape, context.scale.context
    cache = DynamicCache()
    for layer in range(shape.layers):
        keys = torch.randn((2, batch, shape.kv_heads, length, shape.head_dim), device=context.device) * 0.1
        cache.update(*keys.to(context.dtype), layer)
    tokens = torch.randint(3, shape.vocabulary, (batch, 1), device=context.device)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)

    return seconds(step, context.device, rounds=max(3, context.scale.rounds // 2), inner=1, warmup=3)


def _record(context: Context, name: str, took: float, adapters: int = 0) -> Record:
    batch = int(name.rpartition(" ")[2])
    count = adapters or int("one" in name)
    elements = count * context.shape.lora_parameters(RANK)
    floor = decode_work(context.shape, batch, context.scale.context, context.itemsize, elements)
    return Record(name=name, measured=took * 1e3, unit="ms", floor=floor.floor(context.ceilings) * 1e3)


def _ours(context: Context, batches: list[int]) -> list[Record]:
    """This engine's steps of the same kind, in the same run."""
    harness = context.harness
    refs = harness.register(harness.image(random_adapters.lora(context.shape, RANK)), batches[-1])
    harness.make_resident(refs)
    work: dict[str, Callable[[], object]] = {}
    counts = {}
    lanes = []
    for batch in batches:
        for count in sorted({1, batch}):
            lane = harness.decode_lane([refs[index % count] for index in range(batch)], context.scale.context)
            lanes.append(lane)
            name = f"this engine, {count} r{RANK} adapters, batch {batch}"
            work[name], counts[name] = harness.device_work(lane), count
    times = interleaved(work, context.device, rounds=context.scale.rounds, inner=1)
    for lane in lanes:
        harness.release(lane)
    harness.let_go(refs)
    return [_record(context, name, took, counts[name]) for name, took in times.items()]
