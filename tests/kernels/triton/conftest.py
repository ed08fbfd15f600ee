"""Kernels on a GPU or in Triton's interpreter, on pages that are NaN but for the tokens that a sequence holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels import gated, norms, paged_decode, paged_prefill, rope_write, triton_runtime

CPU = torch.device("cpu")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
"""Relative RMS error by dtype. The interpreter cuts off where a GPU rounds to bfloat16: twice the error."""


@dataclass
class Paged:
    """Sequences in scattered pages; all that no sequence may see is NaN, and unused page ids are out of any range.

    Attributes:
        lengths: keys of each sequence.
        hidden: keys of each that lie before every window, whose pages are gone.
    """

    lengths: Sequence[int]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    page_tokens: int = 16
    dtype: torch.dtype = torch.float32
    hidden: Sequence[int] | None = None
    seed: int = 0
    device: torch.device = CPU
    pages: torch.Tensor = field(init=False)
    table: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        used = [-(-n // self.page_tokens) for n in self.lengths]
        count = 2 * sum(used) + 3
        shape = (count, 2, self.page_tokens, self.kv_heads, self.head_dim)
        self.pages = torch.full(shape, float("nan"), dtype=self.dtype)
        self.table = torch.full((len(used), max(used, default=0) + 1), 2**30, dtype=torch.int32)
        free = iter(np.random.default_rng(self.seed).permutation(count).tolist())
        for i, n in enumerate(self.lengths):
            content = torch.Generator().manual_seed(1000 * i + n)
            k, v = torch.randn(2, n, self.kv_heads, self.head_dim, generator=content).to(self.dtype)
            gone = 0 if self.hidden is None else self.hidden[i]
            for token in range(gone, n):
                place = token // self.page_tokens
                if self.table[i, place] == 2**30:
                    self.table[i, place] = next(free)
                self.pages[self.table[i, place], :, token % self.page_tokens] = torch.stack((k[token], v[token]))
        self.pages, self.table = self.pages.to(self.device), self.table.to(self.device)

    def queries(self, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(rows, self.heads, self.head_dim, generator=generator).to(self.device, self.dtype)

    def place(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def lengths_tensor(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def decode(
        self, q: torch.Tensor, window: int = 0, capacity: int | None = None, exact: bool = False
    ) -> torch.Tensor:
        """The kernel's result, or the reference's in float64."""
        lengths = np.asarray(self.lengths, dtype=np.int32)
        needed, starts = paged_decode.list_decode_tiles(paged_decode.count_splits(lengths, window))
        tiles = np.full((len(needed) if capacity is None else capacity, 2), 2**30, dtype=np.int32)
        tiles[: len(needed)] = needed
        rest = (self.table, self.lengths_tensor, self.place(tiles), self.place(starts), self.scale, window)
        if exact:
            return paged_decode.paged_decode_reference(q.double(), self.pages.double(), *rest)
        return paged_decode.launch_paged_decode(q, self.pages, *rest)

    def prefill(self, q: torch.Tensor, rows: Sequence[int], window: int = 0, exact: bool = False) -> torch.Tensor:
        """The kernel's result for the last ``rows`` tokens of each sequence, or the reference's in float64."""
        starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
        queries = paged_prefill.tile_queries(self.heads, self.kv_heads, self.head_dim, self.dtype)
        tiles = paged_prefill.prefill_tiles(starts, np.asarray(self.lengths, dtype=np.int32), queries)
        rest = (self.table, self.place(starts), self.lengths_tensor, self.place(tiles), self.scale, window)
        if exact:
            return paged_prefill.paged_prefill_reference(q.double(), self.pages.double(), *rest)
        return paged_prefill.launch_paged_prefill(q, self.pages, *rest)


@dataclass
class Compilation:
    """A run of compile_ahead.py under way."""

    process: subprocess.Popen[bytes]
    log: Path

    def records(self) -> list[dict[str, Any]]:
        code = self.process.wait(timeout=280)
        assert code == 0, self.log.with_suffix(".err").read_text()
        records: list[dict[str, Any]] = json.loads(self.log.read_text())
        return records


def check_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert error <= TOLERANCE[actual.dtype], f"relative RMS error {error:.2e} in {actual.dtype}"


@pytest.fixture(scope="session", autouse=True)
def interpreted(interpreter: None, device: torch.device) -> None:
    """Without a GPU, nothing here runs unless the interpreter was chosen before Triton was first imported."""
    assert (device.type == "cuda") != triton_runtime.INTERPRETED


@pytest.fixture(scope="session", autouse=True)
def compilation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compilation | None]:
    """Compiles for GPUs beside the other tests, where the tests that ask for it are run at all."""
    if not any("compilation_records" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    log = tmp_path_factory.mktemp("compiled") / "records"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "90", "80", "100", "--some"]
    with log.open("w") as output, log.with_suffix(".err").open("w") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        yield Compilation(process, log)
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def compilation_records(compilation: Compilation) -> list[dict[str, Any]]:
    """What each kernel takes of each target: see compile_ahead.py."""
    return compilation.records()


@pytest.fixture
def make_paged(device: torch.device) -> Callable[..., Paged]:
    return partial(Paged, device=device)


@pytest.fixture
def normal(device: torch.device) -> Callable[..., torch.Tensor]:
    """``normal(3, 64, dtype=torch.bfloat16, seed=1)``: random numbers on the device."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return draw


@pytest.fixture
def assert_near() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Fails where the relative RMS error is above the tolerance of the result's dtype, or anything is NaN."""
    return check_close


@pytest.fixture
def kernels() -> SimpleNamespace:
    return SimpleNamespace(
        decode=paged_decode, prefill=paged_prefill, norms=norms, gated=gated, rope=rope_write, runtime=triton_runtime
    )
