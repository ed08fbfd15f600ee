"""Kernels run in Triton's interpreter, which has to be chosen before anything imports Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "interpreter"),
        default="cpu",
        help="what engines in tests run on: plain operators on the CPU, a GPU, or the GPU's kernels in Triton's interpreter",
    )


@pytest.fixture(scope="session")
def interpreter_loops() -> Iterator[None]:
    """The interpreter holds scalars as arrays of one element, which numpy no longer takes for the bounds of a loop."""
    import numpy as np
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang_tensor", patch_index)
        yield
