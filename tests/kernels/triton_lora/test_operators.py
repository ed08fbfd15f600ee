"""The operators of the low-rank kernels declare what they change and what they return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_launch import StepWork, add_embedding, add_entries
from loraplex.kernels.lora_tiles import DeviceEntries, list_entries

OPERATORS = ("count_work", "paged_shrink", "paged_expand", "sum_deltas", "sum_partial")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The operators called and their arguments."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    real = torch.ops.loraplex

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                found.append((name, arguments))
                return getattr(real, name)(*arguments)

            return call

    monkeypatch.setattr("loraplex.kernels.lora_launch.torch.ops.loraplex", Recorder())
    return found


def test_every_operator_passes_opcheck(
    make_pool: Any,
    make_table: Any,
    make_mixtures: Any,
    calls: list[Any],
    check_operator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool(num_layers=1)
    bench, widths = make_mixtures(pool), pool.widths
    adapter, plain = bench.load(experts=("o_proj",), ranks=(3,), num_experts=2, gains=True), pool.load(4)
    table = make_table(pool, [adapter, plain])
    units = np.array([table.unit_of(adapter, 0), table.unit_of(adapter, 1), table.unit_of(plain)])
    lists = list_entries(units, np.array([0, 0, 1]))
    entries = DeviceEntries.copy_of(lists, pool.device)
    work = StepWork.of(entries, table, pool.dtype)
    add_entries(pool.normal(2, 100), pool.normal(2, 100), pool.chunks(0), table, entries, work, 0, widths.groups["o"])
    torch.ops.loraplex.sum_partial(torch.ones(3, 2, 16, device=pool.device))
    tokens = torch.tensor([5, 7], dtype=torch.int32, device=pool.device)
    add_embedding(pool.normal(2, 100), tokens, pool.chunks(None), table, entries, work, widths.embedding)
    monkeypatch.undo()
    by_name = dict(calls)
    assert set(by_name) == set(OPERATORS)
    for name, arguments in by_name.items():
        check_operator(name, arguments)
