"""How long the host takes to plan and describe decode steps: scheduler, step arrays, and what their results mean.

There is no model and no device, so it holds for any machine of like speed: pages, adapters and sequences are real, and
every sequence is told the same token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import checkout  # noqa: F401  (before anything of loraplex)
import numpy as np
import random_adapters
import torch
from costs import LLAMA_8B, ModelShape
from host_model import HostModel

from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.lora_tiles import list_entries
from loraplex.kernels.paged_decode import count_splits, list_decode_tiles
from loraplex.kernels.step_buffers import HostRing
from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.adapter_directory import AdapterReady
from loraplex.server.device_batch import DeviceBatch, DeviceBatchMaker
from loraplex.server.device_capacities import Capacities, ShapeLimits, bucket_capacities, exact_capacities
from loraplex.server.device_program import Machine, StepProgram
from loraplex.server.messages import AdapterRef, Generate, SamplingParams
from loraplex.server.scheduler import Scheduler
from loraplex.server.scheduler_config import SchedulerConfig
from loraplex.server.step_plan import SampledToken

MIXES = ("base", "one adapter", "distinct", "half base", "mixlora")
_TOKEN = 5


class _Layouts:
    """An ``AdapterDirectory`` of adapters that are layouts alone."""

    def __init__(self, model: HostModel) -> None:
        self._model = model
        self.specs = {
            "lora": random_adapters.lora(model.shape, 16),
            "mixlora": random_adapters.mixlora(model.shape, 16),
        }
        self._layouts = {kind: model.layout(spec) for kind, spec in self.specs.items()}

    def lookup(self, ref: AdapterRef) -> AdapterReady:
        return AdapterReady(ref.name, self._model.pages_of(self._layouts[ref.path]))

    def enter(self, ref: AdapterRef, pages: list[int]) -> ResidentAdapter:
        spec: AdapterSpec = self.specs[ref.path]
        return self._model.resident(self._layouts[ref.path], spec, pages)

    def is_at_hand(self, ref: AdapterRef) -> bool:
        return True

    def hold(self, ref: AdapterRef) -> None:
        """Nothing leaves."""

    def release_hold(self, ref: AdapterRef) -> None:
        """Nothing leaves."""

    def is_full_of(self, refs: object) -> bool:
        return False


@dataclass(slots=True)
class HostTimes:
    """Seconds of each step, by part."""

    schedule: list[float] = field(default_factory=list)
    make: list[float] = field(default_factory=list)
    fill: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Microseconds; of the preparation also the least, which other work on the machine has not disturbed."""
        prepare = [made + filled for made, filled in zip(self.make, self.fill)]
        parts = {"schedule": self.schedule, "prepare": prepare, "complete": self.complete}
        parts |= {"make": self.make, "fill": self.fill}
        found = {name: median(some) * 1e6 for name, some in parts.items()}
        return found | {"prepare_least": min(prepare) * 1e6}


class _Buffers:
    """The host's side of the buffers that steps are sent in; see ``DeviceRunner``.

    Args:
        pool_tokens: tokens whose K/V fits the pool.
    """

    def __init__(self, pool_tokens: int, max_pages: int = 4096) -> None:
        self._shapes = ShapeLimits(pool_tokens, 512, 32, (None,))
        self._programs: dict[Capacities, StepProgram] = {}
        self._last: StepProgram | None = None
        self._ring = HostRing(torch.device("cpu"))
        nothing: Any = None
        page_table = torch.zeros((1025, max_pages), dtype=torch.int32)
        self._machine = Machine(nothing, torch.zeros(0), nothing, page_table, torch.zeros(0, dtype=torch.int64))

    def fill(self, batch: DeviceBatch) -> None:
        """Find the step's shape, and write its arrays and pages as it has them."""
        if self._last is not None and self._last.fits(batch):
            self._last.send(batch, self._ring)
            return
        if batch.only_decodes:
            capacities = bucket_capacities(batch, self._shapes, frozenset(), 0)
        else:
            capacities = exact_capacities(batch, frozenset(), 0)
        if capacities not in self._programs:
            self._programs[capacities] = StepProgram(capacities, self._machine)
        self._last = self._programs[capacities]
        self._last.send(batch, self._ring)


def adapters_of(mix: str, batch: int) -> list[AdapterRef | None]:
    """The adapter of each row."""
    kind = "mixlora" if mix == "mixlora" else "lora"
    refs = [AdapterRef(name=f"{kind}-{index}", path=kind) for index in range(batch)]
    match mix:
        case "base":
            return [None] * batch
        case "one adapter":
            return [refs[0]] * batch
        case "half base":
            return [ref if index % 2 else None for index, ref in enumerate(refs)]
        case _:
            return list(refs)


def measure(mix: str, batch: int, *, context: int, steps: int, shape: ModelShape = LLAMA_8B) -> dict[str, float]:
    """Median microseconds of each part of a decode step."""
    pages = batch * (200 + (context + steps) // 16 + 2) if mix == "mixlora" else batch * (60 + context // 16 + 40)
    model = HostModel(shape, num_pages=pages + batch * 60)
    pool = PagePool(model.num_pages)
    kv, cache, directory = KvCache(pool, model.pages.page_tokens), AdapterCache(pool), _Layouts(model)
    limits = SchedulerConfig(
        max_model_len=shape.max_positions, max_running=batch, max_batch_tokens=8192, prefill_chunk=8192,
        prefix_caching=False,
    )  # fmt: skip
    scheduler = Scheduler(limits, pool, kv, cache, directory)
    maker = DeviceBatchMaker(
        kv, model.table, (None,), max_sequences=batch, max_pages=shape.max_positions // 16, prompt_tile=64
    )
    for index, ref in enumerate(adapters_of(mix, batch)):
        params = SamplingParams(max_tokens=steps + 64, temperature=0.0, ignore_eos=True)
        scheduler.add(Generate(request_id=str(index), prompt_ids=[_TOKEN] * context, params=params, adapter=ref))
    buffers = _Buffers(model.num_pages * model.pages.page_tokens)
    return _run(scheduler, directory, maker, buffers, batch, steps)


def _run(
    scheduler: Scheduler, directory: _Layouts, maker: DeviceBatchMaker, buffers: _Buffers, batch: int, steps: int
) -> dict[str, float]:
    resident: dict[str, ResidentAdapter] = {}
    times, warm = HostTimes(), 0
    while len(times.make) < steps:
        at = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        for page_in in plan.page_ins:
            resident[page_in.identity] = directory.enter(page_in.ref, page_in.pages)
            scheduler.page_ins.end(page_in.identity)
        entered = time.perf_counter()
        prepared = maker.make(plan.chunks, resident)
        made = time.perf_counter()
        buffers.fill(prepared)
        filled = time.perf_counter()
        sampled = {chunk.sequence.seq_id: SampledToken(_TOKEN) for chunk in plan.chunks if chunk.samples}
        ready = time.perf_counter()
        scheduler.complete(plan, sampled, {}, {})
        done = time.perf_counter()
        assert plan.chunks, "nothing is left to do"
        if plan.num_tokens == batch == len(plan.chunks):
            warm += 1
        if warm > 3:
            times.schedule.append(planned - at)
            times.make.append(made - entered)
            times.fill.append(filled - made)
            times.complete.append(done - ready)
    return times.medians()


def measure_parts(batch: int, context: int) -> dict[str, float]:
    """Microseconds of parts: the entries of distinct adapters, attention's tiles, an adapter's entry in the table."""
    directory = _Layouts(HostModel(LLAMA_8B))
    pages = list(range(1 << 9))
    units, rows = np.random.default_rng(0).permutation(batch).astype(np.int64), np.arange(batch)
    lengths = np.full(batch, context, dtype=np.int32)
    parts: dict[str, Callable[[], object]] = {
        "list_entries": lambda: list_entries(units, rows),
        "list_decode_tiles": lambda: list_decode_tiles(count_splits(lengths, 0)),
        "enter LoRA": lambda: directory.enter(AdapterRef(name="", path="lora"), pages),
        "enter MixLoRA": lambda: directory.enter(AdapterRef(name="", path="mixlora"), pages),
    }
    return {name: _median_of(function) * 1e6 for name, function in parts.items()}


def _median_of(function: Callable[[], object], repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def table(batch: int, context: int, steps: int) -> tuple[str, dict[str, dict[str, float]]]:
    """A line for each mix; and the figures."""
    found = {mix: measure(mix, batch, context=context, steps=steps) for mix in MIXES}
    parts = measure_parts(batch, context)
    lines = ["| rows | plan | arrays | buffer | prepare (both) | its least | account |", "|" + " --- |" * 7]
    names = ("schedule", "make", "fill", "prepare", "prepare_least", "complete")
    lines += [f"| {mix} | " + " | ".join(f"{t[name]:.0f}" for name in names) + " |" for mix, t in found.items()]
    lines += ["", *(f"- {name}: {took:.0f}" for name, took in parts.items())]
    return "\n".join(lines), found | {"parts": parts}
