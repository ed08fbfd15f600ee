"""Prompts: the base alone and under one LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import random_adapters
from context import Context
from costs import prefill_work
from record import Record
from timing import interleaved

RANK = 16


def run(context: Context) -> Iterator[Record]:
    """Milliseconds of a prompt of the base, and the ratio under an adapter; the two in turn."""
    harness, scale = context.harness, context.scale
    refs = harness.register(harness.image(random_adapters.lora(context.shape, RANK)))
    harness.make_resident(refs)
    for rows in scale.prefills:
        lanes = {"lora": harness.prefill_lane(refs, rows), "base": harness.prefill_lane([None], rows)}
        work = {name: harness.device_work(lane, graph=False) for name, lane in lanes.items()}
        times = interleaved(work, context.device, rounds=scale.rounds // 2, inner=1)
        for lane in lanes.values():
            harness.release(lane)
        least = prefill_work(context.shape, rows, context.itemsize).floor(context.ceilings)
        elements = context.shape.lora_parameters(RANK)
        with_lora = prefill_work(context.shape, rows, context.itemsize, elements).floor(context.ceilings)
        yield Record(name=f"base prefill of {rows}", measured=times["base"] * 1e3, unit="ms", floor=least * 1e3)
        yield Record(
            name=f"r{RANK} LoRA prefill over base, {rows} tokens",
            measured=times["lora"] / times["base"],
            unit="x",
            floor=with_lora / least,
            details={"lora_ms": times["lora"] * 1e3},
        )
    harness.let_go(refs)
