"""What a cold adapter adds to the time to the first token: its image lies in pinned host memory, not in the pool."""

from __future__ import annotations

from statistics import median

import random_adapters
from context import Context
from engine_runs import first_token_seconds, random_prompt
from record import Record

RANK = 16
AIM_MS = 0.5


def run(context: Context) -> list[Record]:
    """Requests under the same adapter, in turn with the adapter in the pool and after it was put out."""
    harness, scale = context.harness, context.scale
    image = harness.image(random_adapters.lora(context.shape, RANK))
    (ref,) = harness.register(image)
    times: dict[str, list[float]] = {"cold": [], "resident": [], "base": []}
    for turn in range(scale.cold_requests + 2):
        for name, some in times.items():
            if name == "cold":
                harness.put_out([ref])
            prompt = random_prompt(harness, scale.cold_prompt, turn)
            took = first_token_seconds(harness, None if name == "base" else ref, prompt, f"{name}-{turn}")
            if turn >= 2:
                some.append(took)
        if context.seconds_left < 0:
            break
    harness.put_out([ref])
    ms = {name: median(some) * 1e3 for name, some in times.items()}
    return [
        Record(
            name=f"cold adapter, r{RANK}, added time to first token, median of {len(times['cold'])}",
            measured=ms["cold"] - ms["resident"],
            unit="ms",
            floor=image.num_bytes / context.shape.layers / context.ceilings.from_host * 1e3,
            aim=AIM_MS,
            details={f"{name}_ms": took for name, took in ms.items()}
            | {"whole_image_ms": image.num_bytes / context.ceilings.from_host * 1e3, "prompt": scale.cold_prompt},
        )
    ]
