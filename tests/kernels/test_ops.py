"""Every operator is well-formed for torch, fake tensors included; the packed linear equals the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.kernels import ops
from loraplex.kernels.dense_linear import DenseLinear, can_pack, computed_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Arguments = tuple[Any, ...]


class RowsOfProducts(TorchDispatchMode):
    """Collects the numbers of rows of packed products."""

    def __init__(self, found: set[int]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self._found.add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def shrink_arguments(dtype: torch.dtype) -> Arguments:
    a_ids, x_ids = ids(4, 2, 0, 1, 3, 3).view(3, 2), ids(0, 1, 0, 1, 2, 3).view(3, 2)
    return torch.randn(4, 128).to(dtype), torch.randn(5, 128).to(dtype), a_ids, x_ids


def expand_arguments(dtype: torch.dtype) -> Arguments:
    chunks = torch.randn(5, 128).to(dtype)
    return torch.randn(3), chunks, ids(4, 1, 0, 2), ids(0, 1, 2, 2), ids(0, 0, 2, 3, 4)


def route_arguments(dtype: torch.dtype) -> Arguments:
    logits = torch.randn(3, 4)
    return logits, ids(2, 1, 4), torch.tensor([True, False, False]), torch.tensor([2.0, 2.0, 0.5]), torch.ones(3)


def write_kv_arguments(dtype: torch.dtype) -> Arguments:
    k, v = torch.randn(2, 2, 8).to(dtype)
    return torch.zeros(12, 8, dtype=dtype), k, v, ids(3, 4), ids(7, 11)


def decode_arguments(dtype: torch.dtype) -> Arguments:
    q, half_pages = torch.randn(2, 2, 3, 16).to(dtype), torch.randn(8, 4, 2, 16).to(dtype)
    mask = torch.zeros(2, 1, 1, 8, dtype=dtype)
    mask[1, ..., 5:] = float("-inf")
    pages = ids(0, 2, 4, 6).view(2, 2)
    return q, half_pages, pages, pages + 1, ids(13, 14, 15), mask


def prefill_arguments(dtype: torch.dtype) -> Arguments:
    q, half_pages = torch.randn(3, 2, 5, 16).to(dtype), torch.randn(8, 4, 2, 16).to(dtype)
    mask = torch.zeros(5, 7, dtype=dtype).masked_fill(torch.ones(5, 7).triu(3).bool(), float("-inf"))
    return q, half_pages, ids(6, 0), ids(7, 1), 7, mask


OPERATORS: dict[str, Callable[[torch.dtype], Arguments]] = {
    "shrink": shrink_arguments,
    "expand": expand_arguments,
    "route": route_arguments,
    "write_kv": write_kv_arguments,
    "decode_attention": decode_arguments,
    "prefill_attention": prefill_arguments,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_opcheck(name: str, dtype: torch.dtype, check_operator: Any) -> None:
    torch.manual_seed(0)
    check_operator(name, OPERATORS[name](dtype))


def test_no_operator_is_left_out_of_opcheck() -> None:
    public = {
        name
        for name, value in vars(ops).items()
        if callable(value) and getattr(value, "__module__", "") == ops.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(OPERATORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_is_a_sum_of_dot_products(dtype: torch.dtype, assert_close: Any) -> None:
    torch.manual_seed(0)
    x, chunks, a_ids, x_ids = shrink_arguments(dtype)
    expected = (chunks[a_ids].double() * x[x_ids].double()).sum((1, 2))
    assert_close(ops.shrink(x, chunks, a_ids, x_ids), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_sums_each_bag_and_leaves_empty_ones_zero(dtype: torch.dtype, assert_close: Any) -> None:
    torch.manual_seed(0)
    low_rank, chunks, b_ids, b_rows, starts = expand_arguments(dtype)
    rows = low_rank.double()[b_rows, None] * chunks[b_ids].double()
    expected = torch.stack([torch.zeros(128).double(), rows[0] + rows[1], rows[2], rows[3], torch.zeros(128).double()])
    found = ops.expand(low_rank, chunks, b_ids, b_rows, starts)
    assert found.dtype is dtype
    assert_close(found, expected)
    assert not found[0].any()
    assert not found[4].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_packed_linear_equals_the_plain_one(dtype: torch.dtype, rows: int, bias: bool, assert_close: Any) -> None:
    torch.manual_seed(0)
    weight, x = (torch.randn(300, 100) / 10).to(dtype), torch.randn(rows, 100).to(dtype)
    shift = torch.randn(300).to(dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    for pack in (False, True):
        linear = DenseLinear(weight.clone(), shift, pack=pack)
        assert (linear.in_features, linear.out_features) == (100, 300)
        assert_close(linear(x), expected)


def test_packed_products_of_any_number_of_rows_are_made_for_few(assert_close: Any) -> None:
    weight, sizes = torch.randn(24, 40), set[int]()
    bias = torch.randn(24)
    linear = DenseLinear(weight.clone(), bias, pack=True)
    with RowsOfProducts(sizes):
        for rows in range(1, 300):
            x = torch.randn(rows, 40)
            y = linear(x)
            assert y.shape == (rows, 24)
            assert y.is_contiguous()
            assert_close(y, F.linear(x.double(), weight.double(), bias.double()))
    assert len(sizes) <= 50
    assert all(computed_rows(rows) <= rows * 9 / 8 for rows in range(5000))


def test_only_what_this_machine_multiplies_fast_is_packed() -> None:
    assert can_pack(torch.zeros(2, 2)) == torch.backends.mkldnn.is_available()
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
