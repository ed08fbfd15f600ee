"""What records measure with: the device, the sizes of a run, the ceilings, and how much time is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from costs import LLAMA_8B, TINY, Ceilings, ModelShape
from harness import Harness
from random_base import Base, make_base

from loraplex.server.engine_config import KernelsName


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run is.

    Attributes:
        context: tokens before a decode step.
        batches: rows of decode steps, one distinct adapter each.
        mixture_batches: likewise of mixtures.
        prefills: tokens of prompts.
        rounds, inner: samples of a figure, and calls of a sample.
        wall_steps: steps of the whole engine in a figure.
        pool_bytes, bare_pool_bytes: of the pool, and of that of an engine that never has an adapter.
        host_batch: rows of the record of host times.
        cold_requests: samples of the first token under a cold adapter.
        cold_prompt: tokens of their prompts.
        crowd, few: adapters of the two runs over S-LoRA's trace.
        crowd_requests: of the trace.
        crowd_lengths: least and largest prompt and output of the trace.
        crowd_limit: seconds after which a run over the trace is cut.
        copy_bytes, matmul_size: of the ceilings.
    """

    context: int = 1024
    batches: tuple[int, ...] = (1, 16, 64)
    mixture_batches: tuple[int, ...] = (1, 16)
    prefills: tuple[int, ...] = (512, 2048)
    rounds: int = 20
    inner: int = 5
    wall_steps: int = 60
    pool_bytes: int = 64 << 30
    bare_pool_bytes: int = 2 << 30
    host_batch: int = 256
    cold_requests: int = 30
    cold_prompt: int = 512
    crowd: int = 2000
    few: int = 5
    crowd_requests: int = 2500
    crowd_lengths: tuple[int, int] = (8, 512)
    crowd_limit: float = 75.0
    copy_bytes: int = 4 << 30
    matmul_size: int = 8192


FULL = Scale()
SMOKE = Scale(
    context=40,
    batches=(1, 3),
    mixture_batches=(1, 2),
    prefills=(32,),
    rounds=2,
    inner=1,
    wall_steps=3,
    pool_bytes=24 << 20,
    bare_pool_bytes=2 << 20,
    host_batch=8,
    cold_requests=2,
    cold_prompt=20,
    crowd=12,
    few=2,
    crowd_requests=14,
    crowd_lengths=(2, 6),
    crowd_limit=20.0,
    copy_bytes=1 << 22,
    matmul_size=256,
)


@dataclass(slots=True)
class Context:
    """Passed to every record.

    Attributes:
        device, dtype, shape: of the model.
        kernels: that the engine runs by, as in its configuration.
        deadline: on the monotonic clock, for the record that runs.
        ceilings: what the device can do, once measured.
    """

    device: torch.device
    dtype: torch.dtype
    shape: ModelShape
    scale: Scale
    kernels: KernelsName = "auto"
    deadline: float = 0.0
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(1.0, 1.0, 1.0))
    _base: Base | None = None
    _harness: Harness | None = None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def seconds_left(self) -> float:
        """Of the record that runs."""
        return self.deadline - time.monotonic()

    @property
    def base(self) -> Base:
        """The model, made when first asked for."""
        if self._base is None:
            self._base = make_base(self.shape, self.device, self.dtype)
        return self._base

    @property
    def harness(self) -> Harness:
        """The engine that all records share, made when first asked for."""
        if self._harness is None:
            self._harness = Harness(self.base, self.scale.pool_bytes, kernels=self.kernels)
        return self._harness

    def close(self) -> None:
        """Let go of the shared engine and its pool."""
        if self._harness is not None:
            self._harness.close()
            self._harness = None

    def limit_to(self, seconds: float, overall: float) -> None:
        """Give the next record so many seconds, at most until ``overall``."""
        self.deadline = min(time.monotonic() + seconds, overall)


def on_device(device: str) -> tuple[torch.device, torch.dtype]:
    """A device by name, and the dtype of a model on it."""
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32


def choose(tiny: bool) -> tuple[ModelShape, Scale]:
    """Shape and sizes of a run."""
    return (TINY, SMOKE) if tiny else (LLAMA_8B, FULL)
