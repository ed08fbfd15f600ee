"""The operators of mixtures have schemas and shapes that hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.device_mixture import run_experts
from loraplex.kernels.router_plan import RoutedRows

OPERATORS = ("route_on_device", "sort_on_device", "expert_hidden", "combine_experts", "share_bias")


class Recorder:
    """Stands for the operators, and keeps the arguments of each one's last call."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[name] = arguments
            return getattr(torch.ops.loraplex, name)(*arguments)

        return call


def test_every_operator_passes_opcheck(make_bench: Any, check_operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, recorder = make_bench(), Recorder()
    adapter = bench.load(
        experts=("gate_proj", "down_proj"), routers=("mlp",), scope="ffn", num_experts=2, limit=2, renormalize=True
    )
    monkeypatch.setattr("loraplex.kernels.device_mixture.ROUTE_OPERATORS", recorder)
    monkeypatch.setattr("loraplex.kernels.device_mixture.EXPERT_OPERATORS", recorder)
    groups, normal = bench.pool.widths.groups, bench.pool.normal
    routed = bench.routed([RoutedRows(adapter, np.array([0]))])
    arguments = (bench.chunks, bench.table, routed, 1, groups["gate_up"], normal(144), "silu")
    experts = run_experts(normal(1, 144), normal(1, 100), *arguments)
    experts.combine(1, lambda: normal(1, 72))
    experts.add_down(normal(1, 100), bench.chunks, 1, groups["down"], lambda hidden: hidden, normal(100))
    assert set(recorder.calls) == set(OPERATORS)
    for name in OPERATORS:
        check_operator(name, recorder.calls[name])
