"""Decode steps: the base alone, LoRA beside it, base rows where adapters are resident, and the LoRA kernels alone."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import random_adapters
from context import Context
from costs import decode_work
from engine_runs import DecodeRun
from harness import Harness
from record import Record
from timing import interleaved, seconds

from loraplex.server.messages import AdapterRef

RANK = 16
BASE_MS = 3.7
LORA_OVER_BASE = {1: 1.05, 16: 1.12, 64: 1.30}
BASE_BESIDE_LORA = 1.01
KERNEL_SHARE = 0.70

_TURNS = 6


def run(context: Context) -> Iterator[Record]:
    """All of them, over one set of resident adapters."""
    harness, scale = context.harness, context.scale
    yield from base_step(context)
    refs = harness.register(harness.image(random_adapters.lora(context.shape, RANK)), max(scale.batches))
    harness.make_resident(refs)
    for batch in scale.batches:
        yield from lora_step(context, refs[:batch])
    yield kernels_alone(context, refs)
    yield base_beside_lora(context)
    harness.let_go(refs)


def base_step(context: Context) -> list[Record]:
    """A step of one row of the base: the device's time by replaying a graph, and the engine's by the clock."""
    harness, scale = context.harness, context.scale
    lane = harness.decode_lane([None], scale.context)
    step = seconds(harness.device_work(lane), context.device, rounds=scale.rounds, inner=scale.inner)
    harness.release(lane)
    wall = _wall(context, harness, [None])
    floor = decode_work(context.shape, 1, scale.context, context.itemsize).floor(context.ceilings) * 1e3
    return [
        Record(name="base decode step, batch 1, device", measured=step * 1e3, unit="ms", floor=floor, aim=BASE_MS),
        Record(name="base decode step, batch 1, engine", measured=wall * 1e3, unit="ms", floor=floor, aim=BASE_MS),
    ]


def lora_step(context: Context, refs: list[AdapterRef]) -> list[Record]:
    """A step of one row for each of the adapters over the same step of the base; the two in turn."""
    harness, scale = context.harness, context.scale
    batch = len(refs)
    lanes = {
        "lora": harness.decode_lane(refs, scale.context),
        "base": harness.decode_lane([None] * batch, scale.context),
    }
    work = {name: harness.device_work(lane) for name, lane in lanes.items()}
    times = interleaved(work, context.device, rounds=scale.rounds, inner=scale.inner)
    del work
    for lane in lanes.values():
        harness.release(lane)
    walls = {"lora": _wall(context, harness, refs), "base": _wall(context, harness, [None] * batch)}
    return [
        lora_ratio(context, batch, times["lora"], times["base"], "device"),
        lora_ratio(context, batch, walls["lora"], walls["base"], "engine"),
    ]


def lora_ratio(context: Context, batch: int, lora: float, base: float, where: str) -> Record:
    """The record of one ratio of seconds."""
    elements = batch * context.shape.lora_parameters(RANK)
    least = decode_work(context.shape, batch, context.scale.context, context.itemsize).floor(context.ceilings)
    with_lora = decode_work(context.shape, batch, context.scale.context, context.itemsize, elements)
    return Record(
        name=f"r{RANK} LoRA decode over base, {batch} distinct, {where}",
        measured=lora / base,
        unit="x",
        floor=with_lora.floor(context.ceilings) / least,
        aim=LORA_OVER_BASE.get(batch),
        details={"lora_ms": lora * 1e3, "base_ms": base * 1e3, "base_floor_ms": least * 1e3},
    )


def base_beside_lora(context: Context) -> Record:
    """The engine's step of base rows where adapters are resident, over that of an engine that never had one."""
    batch = context.scale.batches[min(1, len(context.scale.batches) - 1)]
    bare = Harness(
        context.base, context.scale.bare_pool_bytes + batch * _pool_bytes_of_a_row(context), kernels=context.kernels
    )
    runs = {
        "with": DecodeRun(context.harness, [None] * batch, context.scale.context, "with"),
        "without": DecodeRun(bare, [None] * batch, context.scale.context, "without"),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_TURNS):
        for name, one in runs.items():
            samples[name].append(one.seconds_per_step(max(2, context.scale.wall_steps // _TURNS)))
    walls = {name: median(some) for name, some in samples.items()}
    for one in runs.values():
        one.close()
    bare.close()
    return Record(
        name=f"base-only requests beside resident adapters, batch {batch}",
        measured=walls["with"] / walls["without"],
        unit="x",
        floor=1.0,
        aim=BASE_BESIDE_LORA,
        details={f"{name}_ms": took * 1e3 for name, took in walls.items()},
    )


def _pool_bytes_of_a_row(context: Context) -> int:
    """Pool that a sequence of the runs takes, with room to grow by as many tokens as there are steps."""
    return 2 * context.shape.kv_elements(context.scale.context + 8 * context.scale.wall_steps) * context.itemsize


def kernels_alone(context: Context, refs: list[AdapterRef]) -> Record:
    """Bytes of adapters a second that the LoRA work of a decode step reaches, as a share of the copy's."""
    harness, scale = context.harness, context.scale
    lane = harness.decode_lane(refs, scale.context)
    took = seconds(harness.lora_work(lane), context.device, rounds=scale.rounds, inner=scale.inner)
    harness.release(lane)
    num_bytes = len(refs) * context.shape.lora_parameters(RANK) * context.itemsize
    return Record(
        name=f"LoRA kernels alone, {len(refs)} distinct r{RANK}, share of the copy's bandwidth",
        measured=num_bytes / took / context.ceilings.copy,
        unit="",
        floor=1.0,
        aim=KERNEL_SHARE,
        higher_is_better=True,
        details={"ms": took * 1e3, "adapter_gb": num_bytes / 1e9, "tb_per_s": num_bytes / took / 1e12},
    )


def _wall(context: Context, harness: Harness, refs: list[AdapterRef] | list[None]) -> float:
    """Seconds of a step of the whole engine."""
    run = DecodeRun(harness, refs, context.scale.context, "wall")
    took = run.seconds_per_step(context.scale.wall_steps)
    run.close()
    return took
