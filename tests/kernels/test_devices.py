"""Which devices the operators have kernels for."""

from __future__ import annotations

import torch

from loraplex.kernels.devices import has_kernels_for
from loraplex.server.engine_build import choose_device


def test_the_cpu_is_always_served() -> None:
    assert has_kernels_for("cpu")


def test_auto_does_not_take_a_gpu_that_has_no_kernels() -> None:
    expected = "cuda" if torch.cuda.is_available() and has_kernels_for("cuda") else "cpu"
    assert choose_device("auto").type == expected
