"""Decode steps under MixLoRA (8 experts of rank 16, the best two, LoRA on attention) over the base and over LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import random_adapters
from context import Context
from costs import decode_work
from random_adapters import EXPERTS, TOP_K
from record import Record
from timing import interleaved

RANK = 16
OVER_BASE = {1: 1.10, 16: 1.25}


def run(context: Context) -> Iterator[Record]:
    """For each batch, one distinct adapter a row."""
    harness, scale = context.harness, context.scale
    count = max(scale.mixture_batches)
    mixtures = harness.register(harness.image(random_adapters.mixlora(context.shape, RANK)), count)
    loras = harness.register(harness.image(random_adapters.lora(context.shape, RANK)), count)
    harness.make_resident([*mixtures, *loras])
    for batch in scale.mixture_batches:
        lanes = {
            "mixture": harness.decode_lane(mixtures[:batch], scale.context),
            "lora": harness.decode_lane(loras[:batch], scale.context),
            "base": harness.decode_lane([None] * batch, scale.context),
        }
        work = {name: harness.device_work(lane) for name, lane in lanes.items()}
        times = interleaved(work, context.device, rounds=scale.rounds, inner=scale.inner)
        del work
        for lane in lanes.values():
            harness.release(lane)
        yield _record(context, batch, times)
    harness.let_go([*mixtures, *loras])


def _record(context: Context, batch: int, times: dict[str, float]) -> Record:
    elements = batch * context.shape.mixture_parameters(RANK, EXPERTS, TOP_K, context.itemsize)
    size = (context.shape, batch, context.scale.context, context.itemsize)
    least = decode_work(*size).floor(context.ceilings)
    return Record(
        name=f"MixLoRA {EXPERTS} x r{RANK} top-{TOP_K} decode over base, {batch} distinct",
        measured=times["mixture"] / times["base"],
        unit="x",
        floor=decode_work(*size, elements).floor(context.ceilings) / least,
        aim=OVER_BASE.get(batch),
        details={f"{name}_ms": took * 1e3 for name, took in times.items()}
        | {"over_lora": times["mixture"] / times["lora"]},
    )
