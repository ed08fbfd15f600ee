"""Every operator is well-formed for torch, and runs as its plain reference where there is no kernel for the device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Arguments = tuple[Any, ...]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_arguments(dtype: torch.dtype) -> Arguments:
    tiles, table = ints(0, 0, 1, 0).view(2, 2), ints(3, 1, 0, 2).view(2, 2)
    q, pages = torch.randn(2, 4, 16).to(dtype), torch.randn(4, 2, 8, 2, 16).to(dtype)
    return q, pages, table, ints(9, 3), tiles, ints(0, 1, 2), 0.25, 0


def prefill_arguments(dtype: torch.dtype) -> Arguments:
    q, pages, table, lengths, tiles, *_ = decode_arguments(dtype)
    return q.repeat(3, 1, 1), pages, table, ints(0, 3, 6), lengths, tiles, 0.25, 2


def rope_arguments(dtype: torch.dtype) -> Arguments:
    qkv, pages = torch.randn(2, 6 * 16).to(dtype), torch.randn(4, 2, 8, 1, 16).to(dtype)
    norm = torch.randn(16).to(dtype)
    return qkv, ints(3, 0), torch.randn(5, 16), norm, norm.clone(), 1e-5, pages, ints(19, -1)


def norm_arguments(dtype: torch.dtype) -> Arguments:
    return torch.randn(3, 24).to(dtype), torch.randn(24).to(dtype), 1e-5


def add_norm_arguments(dtype: torch.dtype) -> Arguments:
    return torch.randn(3, 24).to(dtype), *norm_arguments(dtype)


def silu_arguments(dtype: torch.dtype) -> Arguments:
    return (torch.randn(3, 24).to(dtype),)


OPERATORS: dict[str, Callable[[torch.dtype], Arguments]] = {
    "paged_decode": decode_arguments,
    "paged_prefill": prefill_arguments,
    "rope_write": rope_arguments,
    "rms_norm": norm_arguments,
    "add_rms_norm": add_norm_arguments,
    "silu_mul": silu_arguments,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_opcheck(name: str, dtype: torch.dtype, check_operator: Any) -> None:
    torch.manual_seed(0)
    check_operator(name, OPERATORS[name](dtype))


@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_tensors_go_to_a_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"loraplex::{name}", "CUDA")


@pytest.mark.parametrize("name", OPERATORS)
def test_public_function_is_its_operator(name: str, kernels: SimpleNamespace) -> None:
    torch.manual_seed(0)
    modules = {"paged_decode": kernels.decode, "paged_prefill": kernels.prefill, "rope_write": kernels.rope}
    module = modules.get(name, kernels.gated if name == "silu_mul" else kernels.norms)
    arguments = OPERATORS[name](torch.float32)
    found, expected = getattr(module, name)(*arguments), getattr(module, f"{name}_reference")(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_operators_that_write_declare_it() -> None:
    assert "Tensor(a!) pages" in str(torch.ops.loraplex.rope_write.default._schema)
