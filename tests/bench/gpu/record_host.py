"""The host's work for one decode step of a large batch: what it takes to prepare, beside planning and accounting."""

from __future__ import annotations

from collections.abc import Iterator

import host_steps
from context import Context
from record import Record

AIM_US = 100.0
_AIM_BATCH = 256


def run(context: Context) -> Iterator[Record]:
    """For each mix of adapters over the rows; no device takes part."""
    batch = context.scale.host_batch
    for mix in host_steps.MIXES:
        size = {"context": context.scale.context, "steps": context.scale.wall_steps}
        times = host_steps.measure(mix, batch, **size, shape=context.shape)
        yield Record(
            name=f"host preparation of a decode step, batch {batch}, {mix}",
            measured=times["prepare"],
            unit="us",
            aim=AIM_US if batch == _AIM_BATCH else None,
            details={f"{part}_us": took for part, took in times.items()},
        )
