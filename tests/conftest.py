"""The device that tests run on, and Triton's interpreter where that is not a GPU.

Triton decides between its interpreter and its compiler when it is first imported, so the device is read from the
command line here, before anything imports Triton.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest

DEVICES = ("cpu", "cuda", "interpreter")


def read_device() -> str:
    """``--device`` of the command line, or else of ``PYTEST_ADDOPTS``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    given = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    return str(parser.parse_known_args(given)[0].device)


READ = read_device()
if READ == "cuda":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="what tests run on. cpu: engines over plain operators, kernels in Triton's interpreter; cuda: engines and "
        "kernels on a GPU; interpreter: engines over the GPU's kernels in Triton's interpreter, which is slow",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_gpu(reason): says nothing of a GPU, and is skipped with --device cuda")
    if config.getoption("--device") != READ:
        raise pytest.UsageError("--device must stand on the command line or in PYTEST_ADDOPTS")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cuda":
        return
    import torch

    has_gpu = torch.cuda.is_available()
    for item in items:
        marker = item.get_closest_marker("without_gpu")
        if marker is not None:
            item.add_marker(pytest.mark.skip(reason=f"--device cuda: {marker.args[0]}"))
        elif not has_gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="--device cuda: there is no CUDA device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Any:
    """The ``torch.device`` of ``--device``. Products of float32 on a GPU are not cut to TF32."""
    import torch

    if request.config.getoption("--device") != "cuda":
        return torch.device("cpu")
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter made to work with today's numpy, and several times as fast; nothing where there is a GPU."""
    if request.config.getoption("--device") == "cuda":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        # The interpreter holds scalars as arrays of one element, which numpy no longer takes for the bounds of a loop.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    get_np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = get_np_dtype(of.scalar)
        return np_dtypes[name]

    @cache
    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.constexpr(prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes(type.shape if type.is_block() else ())

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang_tensor", patch_index)
        # Each sum of integers would be computed again to look for overflows, and nothing said of those found.
        patches.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patches.setattr(interpreter, "_get_np_dtype", np_dtype)
        patches.setattr(tl.core.tensor, "__init__", make_tensor)
        # The language is patched once, and not anew in each call of a function.
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patches.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        yield
        scope.restore()


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """Dot products that add in one order, as a GPU does: those of numpy depend on which row of a matrix it is."""
    if device.type == "cuda":
        return
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=d.data.dtype, optimize=False)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
