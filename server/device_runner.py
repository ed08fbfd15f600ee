"""Carries out steps on a device that works beside the host: each is queued behind the last one, and read when done.

The host never waits for the device in ``launch``; it may prepare and queue a step while the last one runs. Sampled
tokens stay on the device as the next step's input, and are copied to the host for whoever wants to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.kernels.device_adapters import ChoiceLog
from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.step_buffers import HostRing
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.transfer import AdapterTransfer, Arrival, TransferStats
from loraplex.server.device_batch import DeviceBatch, DeviceBatchMaker
from loraplex.server.device_capacities import (
    NO_TABLE,
    Capacities,
    ShapeLimits,
    bucket_capacities,
    exact_capacities,
    usual_buckets,
)
from loraplex.server.device_program import Machine, StepProgram
from loraplex.server.logit_results import LogitResults, read_logits
from loraplex.server.routing_report import ExpertCounts, routing_of_sequences
from loraplex.server.step_plan import Chunk, FinishedStep, PendingStep, StepResult

_MAX_PROGRAMS = 256
"""Captured shapes at most; beyond them the ones used longest ago are given up."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What the runner makes room for.

    Attributes:
        shapes: what the shapes of steps follow from.
        graph_rows: steps of at most so many rows that only decode are padded to a bucket and replayed from a graph,
        graph_prompt_rows: and those with prompts. Longer ones keep the device busy while they are launched.
    """

    shapes: ShapeLimits
    graph_rows: int
    graph_prompt_rows: int


class DeviceRunner:
    """Runs steps on one device.

    Args:
        machine: what they run on.
        batches: makes their arrays.
        transfers: counts what is paged in.
        limits: sizes.
        expert_counts: counts the choices of routers, where the metrics show them.

    Attributes:
        runs_ahead: always; see ``ModelRunner``.
    """

    runs_ahead = True

    def __init__(
        self,
        machine: Machine,
        batches: DeviceBatchMaker,
        transfers: TransferStats,
        limits: DeviceLimits,
        expert_counts: ExpertCounts | None = None,
    ) -> None:
        self._machine = machine
        self._batches = batches
        self.transfers = transfers
        self._transfer = AdapterTransfer(machine.arena, transfers)
        self._limits = limits
        self._expert_counts = expert_counts
        self._resident: dict[str, ResidentAdapter] = {}
        self._model_sites: frozenset[str] = frozenset()
        self._arrivals: dict[str, Arrival] = {}
        self._ring = HostRing(machine.device)
        self._programs: dict[Capacities, StepProgram] = {}
        self._last: tuple[tuple[int, frozenset[str]], StepProgram] | None = None
        self._flashinfer = machine.flashinfer(0) if machine.flashinfer is not None else None
        self._is_cuda = machine.device.type == "cuda"
        self._graph_pool: Any = None

    @property
    def expert_tokens(self) -> dict[str, list[int]]:
        """How often each expert was chosen, by identity, for the adapters with the most; empty where nobody asks."""
        return self._expert_counts.most() if self._expert_counts is not None else {}

    def prepare(self) -> None:
        """Compile and capture what decoding mostly needs, so that no request waits for it."""
        limits = self._limits
        usual = usual_buckets(limits.graph_rows, limits.shapes, self._machine.table.generation)
        with torch.inference_mode():
            for capacities in usual:
                program = self._program(capacities)
                program.plan_attention(None)
                self._run(program)

    def page_in(self, image: AdapterImage, pages: list[int]) -> None:
        """Begin to copy an adapter into its pages; from now on chunks may name it."""
        self._arrivals[image.identity] = self._transfer.page_in(image, pages)
        num_layers, num_pages, page_elems = self._machine.arena.shape
        adapter = ResidentAdapter(
            image.layout, pages, page_elems // 128, num_layers, num_pages, image.routing, image.token_routes
        )
        # It may have been put out since for the sake of K/V, of which nobody told.
        before = self._resident.pop(image.identity, None)
        if before is not None:
            self._machine.table.remove(before)
        self._machine.table.add(adapter)
        self._resident[image.identity] = adapter
        self._model_sites |= frozenset(image.layout.model)

    def has_arrived(self, identity: str) -> bool:
        """Whether the copy of an adapter that was paged in is over; never waits."""
        arrival = self._arrivals.get(identity)
        if arrival is None or arrival.is_complete():
            self._arrivals.pop(identity, None)
            return True
        return False

    def forget(self, identities: Iterable[str]) -> None:
        """Adapters have left the pool; unknown ones are ignored."""
        for identity in identities:
            adapter = self._resident.pop(identity, None)
            if adapter is not None:
                self._machine.table.remove(adapter)

    def forget_all(self) -> None:
        """Whatever was in the pool is in doubt: wait until nothing is under way, and forget it.

        Errors: RuntimeError where the device can be used no more.
        """
        self.forget(list(self._resident))
        self._batches.forget_all()
        if self._is_cuda:
            torch.cuda.synchronize(self._machine.device)
        self._arrivals.clear()
        self._transfer.collect()

    def launch(self, chunks: list[Chunk]) -> PendingStep:
        """Queue a step: one forward pass over the chunks, behind all that was queued before."""
        if not chunks:
            return FinishedStep(StepResult())
        batch = self._batches.make(chunks, self._resident)
        with torch.inference_mode():
            choices = ChoiceLog() if batch.log is not None else None
            logits = self._forward(batch, self._arriving(chunks), choices)
            results = read_logits(logits, batch.chunks, batch.logit_rows)
            if results.sampled is not None:
                self._machine.sampled[: len(results.sequences)].copy_(results.sampled.tokens)
            results = results.to_host()
            if choices is not None:
                choices.to_host()
        done = torch.cuda.Event() if self._is_cuda else None
        if done is not None:
            done.record()
        # By the time the result is read, adapters may have left the pool.
        identities = {adapter: identity for identity, adapter in self._resident.items()} if choices is not None else {}
        return _Launched(batch, choices, results, done, identities, self._expert_counts)

    def _arriving(self, chunks: list[Chunk]) -> list[Arrival]:
        """The adapters of a step that may still be on their way; for others nobody waits."""
        self._transfer.collect()
        if not self._arrivals:
            return []
        named = {identity for chunk in chunks for identity, _ in chunk.adapters}
        return [self._arrivals[identity] for identity in sorted(named) if not self.has_arrived(identity)]

    def _forward(self, batch: DeviceBatch, arriving: list[Arrival], choices: ChoiceLog | None) -> torch.Tensor:
        """[logit rows, vocabulary] float32."""
        if self._has_bucket(batch) and not arriving and choices is None:
            program = self._bucket_program(batch)
            program.send(batch, self._ring)
            return self._run(program)[: batch.num_logits]
        capacities = exact_capacities(batch, self._model_sites, self._machine.table.generation)
        program = StepProgram(capacities, self._machine, self._flashinfer)
        program.send(batch, self._ring)
        return program.run(batch, arriving, choices)

    def _has_bucket(self, batch: DeviceBatch) -> bool:
        if batch.only_decodes:
            return batch.num_rows <= self._limits.graph_rows
        return batch.only_samples and self._flashinfer is None and batch.num_rows <= self._limits.graph_prompt_rows

    def _bucket_program(self, batch: DeviceBatch) -> StepProgram:
        facts = (self._machine.table.generation, self._model_sites)
        if self._last is None or self._last[0] != facts or not self._last[1].fits(batch):
            generation, model_sites = facts
            capacities = bucket_capacities(batch, self._limits.shapes, model_sites, generation)
            self._last = (facts, self._program(capacities))
        return self._last[1]

    def _program(self, capacities: Capacities) -> StepProgram:
        program = self._programs.pop(capacities, None)
        if program is None:
            self._forget_stale(capacities)
            make = self._machine.flashinfer
            program = StepProgram(capacities, self._machine, None if make is None else make(capacities.rows))
        self._programs[capacities] = program
        return program

    def _forget_stale(self, newcomer: Capacities) -> None:
        """Give up graphs over what is no longer there, and the one used longest ago when there are many."""
        if newcomer.generation != NO_TABLE:
            for known in [k for k in self._programs if k.generation not in (NO_TABLE, newcomer.generation)]:
                del self._programs[known]
        if len(self._programs) >= _MAX_PROGRAMS:
            del self._programs[next(iter(self._programs))]

    def _run(self, program: StepProgram) -> torch.Tensor:
        """Replay a shape's graph. The first time it runs as it is, which compiles its kernels; then it is captured."""
        if program.is_captured:
            return program.replay()
        logits = program.run()
        if self._is_cuda:
            if not any(known.is_captured for known in self._programs.values()):
                # One whose graphs are all gone cannot be captured into again.
                self._graph_pool = torch.cuda.graph_pool_handle()
            program.capture(self._graph_pool)
        return logits


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is queued. ``identities`` are of the adapters that were in the pool, where choices are noted."""

    batch: DeviceBatch
    choices: ChoiceLog | None
    results: LogitResults
    done: torch.cuda.Event | None
    identities: Mapping[ResidentAdapter, str]
    expert_counts: ExpertCounts | None

    def result(self) -> StepResult:
        """As in ``PendingStep``."""
        if self.done is not None:
            self.done.synchronize()
        found = self.results.read()
        if self.choices is not None and self.batch.log is not None:
            self.choices.read_into(self.batch.log)
            found.routing.update(routing_of_sequences(self.batch.log, self.batch.pieces, self.identities))
            if self.expert_counts is not None:
                self.expert_counts.add(self.batch.log, self.identities)
        return found
