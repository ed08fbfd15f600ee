"""What steps on a GPU need besides the pool, and the pool's share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplex.memory.arena import page_shape
from loraplex.server import engine_build
from loraplex.server.engine_config import EngineConfig
from loraplex.server.step_memory import step_bytes

GIB = 1 << 30

LLAMA_8B: Any = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, q_size=4096, kv_size=1024, vocab_size=128256, num_layers=32
)


def test_a_model_of_eight_billion_parameters_leaves_most_of_a_gpu_to_the_pool() -> None:
    needed = step_bytes(EngineConfig(model="base"), LLAMA_8B, torch.bfloat16)
    assert 5 * GIB < needed < 8 * GIB


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_running"])
def test_more_rows_need_more(name: str) -> None:
    config = EngineConfig(model="base")
    more = EngineConfig(model="base", **{name: 2 * getattr(config, name)})
    assert step_bytes(more, LLAMA_8B, torch.bfloat16) > step_bytes(config, LLAMA_8B, torch.bfloat16)


def test_flashinfer_needs_its_workspaces() -> None:
    with_it = EngineConfig(model="base", attention="flashinfer")
    assert step_bytes(with_it, LLAMA_8B, torch.bfloat16) > step_bytes(
        EngineConfig(model="base"), LLAMA_8B, torch.bfloat16
    )


@pytest.mark.parametrize(("fraction", "share"), [(None, 0.9), (0.5, 0.5)])
def test_the_pool_of_a_gpu_is_a_share_of_what_steps_leave(
    fraction: float | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model="base", memory_fraction=fraction)
    shape = page_shape(32, 1024, 16, torch.bfloat16)
    monkeypatch.setattr(engine_build, "available_bytes", lambda device: 100 * GIB)
    pages = engine_build._count_pages(config, LLAMA_8B, shape, torch.device("cuda"))
    left = 100 * GIB - step_bytes(config, LLAMA_8B, torch.bfloat16)
    assert pages == int(left * share) // shape.page_bytes


def test_the_pool_of_a_cpu_is_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = page_shape(32, 1024, 16, torch.bfloat16)
    monkeypatch.setattr(engine_build, "available_bytes", lambda device: 100 * GIB)
    pages = engine_build._count_pages(EngineConfig(model="base"), LLAMA_8B, shape, torch.device("cpu"))
    assert pages == 50 * GIB // shape.page_bytes
