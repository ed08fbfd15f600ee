"""The one place where Triton is imported, and how a kernel becomes an operator.

Without Triton the operators run as their plain references on any device; with it, CUDA tensors go to the kernels.
Set ``TRITON_INTERPRET=1`` before the first import to run the kernels on CPU tensors, in Triton's interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:
    triton = None
    tl = None

__all__ = [
    "INTERPRETED",
    "dot_dtype",
    "jit",
    "load_fact",
    "num_resident",
    "power_of_two",
    "register_operator",
    "step_jit",
    "tl",
    "triton",
]

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter of this process."""

_library = torch.library.Library("loraplex", "FRAGMENT")


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit`` where there is Triton; else the function as it is, which nobody calls."""
    return kernel if triton is None else triton.jit(kernel)


def step_jit(*, numbers: Collection[str] = (), arrays: Collection[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``jit`` with one compilation for all steps.

    Triton compiles anew for an integer that is 1 or a multiple of 16, and for a tensor that begins at a multiple of 16
    bytes. Those of these names, as far as a kernel has them, are taken as they come.

    Args:
        numbers: integers that differ from layer to layer or from step to step.
        arrays: tensors that may begin anywhere in a buffer.
    """

    def decorate(kernel: Callable[..., Any]) -> Any:
        if triton is None:
            return kernel
        names = inspect.signature(kernel).parameters
        return triton.jit(
            do_not_specialize=[name for name in names if name in numbers],
            do_not_specialize_on_alignment=[name for name in names if name in arrays],
        )(kernel)

    return decorate


@jit
def load_fact(pointer: tl.tensor) -> tl.tensor:
    """A scalar or a block of what all launches of a step read, and what other loads wait for: it is to stay in the L2
    cache while weights stream through it."""
    return tl.load(pointer, eviction_policy="evict_last")


def register_operator(
    schema: str, *, reference: Callable[..., Any], launch: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Make an operator of the ``loraplex`` namespace.

    Args:
        schema: its signature, such as ``"double(Tensor x) -> Tensor"``.
        reference: what it computes, on plain tensors of any device.
        launch: the same by a kernel, for CUDA tensors.
        fake: shapes and dtypes alone.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None:
        _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"loraplex::{name}", fake)


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of a dot product's operands: the tensors' own. The interpreter has no bfloat16 products, so there they
    are widened first; products of two 16-bit numbers are exact in float32 either way."""
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def num_resident(device: torch.device, shared_bytes: int) -> int:
    """Programs that a GPU runs at once if each takes so much shared memory and nothing else is short. The interpreter
    has two, so that programs come to loop over their work."""
    if INTERPRETED or device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count * (properties.shared_memory_per_multiprocessor // shared_bytes))


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()
