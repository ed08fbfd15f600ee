"""Attention kernels of a library in place of ours: every step is planned for them, and they see what ours see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.paged_decode import paged_decode_reference
from loraplex.kernels.paged_prefill import paged_prefill_reference

PROMPT = [7, 31, 5, 99, 12, 40]


class PlainKernels:
    """Takes plans as ``FlashInferAttention`` does, and runs the plain references by them."""

    def __init__(self, rows: int, scale: float) -> None:
        self.rows = rows
        self.plans = 0
        self._scale = scale

    def plan(self, page_table: Any, lengths: Any, row_starts: Any, prompt_lengths: Any) -> None:
        assert not self.rows or (len(lengths) == self.rows and not len(prompt_lengths))
        assert len(page_table) == len(lengths) + len(prompt_lengths)
        self.plans += 1
        arrays = (page_table, lengths, row_starts, prompt_lengths)
        self._plan = [torch.from_numpy(np.array(array)) for array in arrays]

    def decode(self, q: torch.Tensor, pages: torch.Tensor, window: int | None) -> torch.Tensor:
        table, lengths, _, _ = self._plan
        none = lengths[:0]
        return paged_decode_reference(q, pages, table[: len(lengths)], lengths, none, none, self._scale, window or 0)

    def prefill(self, q: torch.Tensor, pages: torch.Tensor, window: int | None) -> torch.Tensor:
        table, lengths, row_starts, prompt_lengths = self._plan
        rest = (row_starts, prompt_lengths, prompt_lengths[:0], self._scale, window or 0)
        return paged_prefill_reference(q, pages, table[len(lengths) :], *rest)


@pytest.mark.parametrize("base", ["small-llama", "small-mistral"])
def test_every_step_is_planned(base: str, checkpoints: Callable[[str], Any], make_engine: Any) -> None:
    drivers = [make_engine(checkpoints(base), kernels=kernels, prefill_chunk=8) for kernels in ("plain", "triton")]
    made: list[PlainKernels] = []

    config = checkpoints(base).model.config
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5

    def make(rows: int) -> Any:
        made.append(PlainKernels(rows, scale))
        return made[-1]

    runner = drivers[1].engine._parts.runner
    runner._machine = replace(runner._machine, flashinfer=make)
    runner._flashinfer = make(0)
    found = []
    for driver in drivers:
        for name, prompt in {"short": PROMPT, "long": PROMPT * 4, "late": PROMPT[:3]}.items():
            driver.generate(name, prompt, max_tokens=4)
            driver.step()
        driver.run()
        found.append({key: choice.tokens for key, choice in driver.choices.items()})
    assert found[0] == found[1]
    assert {kernels.rows for kernels in made} > {0}, "steps that only decode have kernels for their bucket"
    assert sum(kernels.plans for kernels in made) >= drivers[1].engine.stats().steps
