"""The parts of a step of either runner, to be timed one by one: the host's, the device's, and the adapters' alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from timing import captured

from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.step_adapters import LayerAdapters
from loraplex.kernels.step_buffers import HostRing
from loraplex.server.decoder import Decoder
from loraplex.server.device_batch import DeviceBatch
from loraplex.server.device_capacities import bucket_capacities, exact_capacities
from loraplex.server.device_program import StepProgram
from loraplex.server.device_runner import DeviceRunner
from loraplex.server.model_runner import ModelRunner
from loraplex.server.step_plan import Chunk

Work = Callable[[], object]


class RunnerSteps(Protocol):
    """A runner taken apart."""

    @property
    def arena(self) -> torch.Tensor: ...
    @property
    def decoder(self) -> Decoder: ...

    def prepare(self, chunks: Sequence[Chunk]) -> object:
        """The host's description of a step."""

    def device_work(self, chunks: Sequence[Chunk], *, graph: bool) -> Work:
        """What the device does in a step, to be repeated; as a graph if that is asked for and there are graphs."""

    def adapters(self, chunks: Sequence[Chunk]) -> LayerAdapters:
        """The adapters of a step's rows."""


def steps_of(runner: object) -> RunnerSteps:
    """The parts of a runner's steps."""
    if isinstance(runner, DeviceRunner):
        return DeviceSteps(runner)
    assert isinstance(runner, ModelRunner), f"a runner of another kind: {type(runner).__name__}"
    return PlainSteps(runner)


@dataclass(frozen=True, slots=True)
class PlainSteps:
    """Of the runner by plain operators."""

    runner: ModelRunner

    @property
    def arena(self) -> torch.Tensor:
        return self.runner._arena

    @property
    def decoder(self) -> Decoder:
        return self.runner._decoder

    @property
    def resident(self) -> Mapping[str, ResidentAdapter]:
        return self.runner._resident

    def prepare(self, chunks: Sequence[Chunk]) -> object:
        return self.runner._batches.make(chunks, self.resident)

    def device_work(self, chunks: Sequence[Chunk], *, graph: bool) -> Work:
        step = self.runner._batches.make(chunks, self.resident).step

        @torch.inference_mode()
        def forward() -> torch.Tensor:
            return self.decoder.forward(step, self.arena)

        return captured(forward, self.arena.device) if graph else forward

    def adapters(self, chunks: Sequence[Chunk]) -> LayerAdapters:
        found = self.runner._batches.make(chunks, self.resident).step.adapters
        assert found is not None, "rows without adapters"
        return found


@dataclass(frozen=True, slots=True)
class DeviceSteps:
    """Of the runner by kernels. Each step here has buffers of its own, so that several can be repeated in turn."""

    runner: DeviceRunner

    @property
    def arena(self) -> torch.Tensor:
        return self.runner._machine.arena

    @property
    def decoder(self) -> Decoder:
        return self.runner._machine.decoder

    def prepare(self, chunks: Sequence[Chunk]) -> object:
        return self.runner._batches.make(chunks, self.runner._resident)

    def device_work(self, chunks: Sequence[Chunk], *, graph: bool) -> Work:
        program, batch = self._program(chunks, graph=graph)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            return program.run(None if graph else batch)

        return captured(run, self.arena.device) if graph else run

    def adapters(self, chunks: Sequence[Chunk]) -> LayerAdapters:
        program, _ = self._program(chunks, graph=True)
        with torch.inference_mode():
            found = program._adapters(None, (), None)
        assert found is not None, "rows without adapters"
        return found

    def _program(self, chunks: Sequence[Chunk], *, graph: bool) -> tuple[StepProgram, DeviceBatch]:
        runner = self.runner
        batch = runner._batches.make(chunks, runner._resident)
        generation, sites = runner._machine.table.generation, runner._model_sites
        if graph and batch.only_decodes:
            capacities = bucket_capacities(batch, runner._limits.shapes, sites, generation)
        else:
            capacities = exact_capacities(batch, sites, generation)
        shared = runner._machine
        machine = replace(
            shared, page_table=torch.zeros_like(shared.page_table), sampled=torch.zeros_like(shared.sampled)
        )
        program = StepProgram(capacities, machine)
        program.send(batch, HostRing(machine.device))
        return program, batch
