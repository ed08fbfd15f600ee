"""The small fused kernels against their plain forms in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Normal = Callable[..., torch.Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 100, 136, 896, 4096, 14336])
def test_norm_matches_the_reference(
    kernels: SimpleNamespace, normal: Normal, assert_near: Any, width: int, dtype: torch.dtype
) -> None:
    x, weight = normal(3, width, dtype=dtype) * 3, normal(width, dtype=dtype, seed=1)
    expected = kernels.norms.rms_norm_reference(x.double(), weight.double(), 1e-5)
    assert_near(kernels.norms.launch_rms_norm(x, weight, 1e-5), expected)


def test_norm_takes_rows_of_a_wider_tensor(kernels: SimpleNamespace, normal: Normal, assert_near: Any) -> None:
    wide, weight = normal(3, 300), normal(100, seed=1)
    expected = kernels.norms.rms_norm_reference(wide[:, 100:200].double(), weight.double(), 1e-5)
    assert_near(kernels.norms.launch_rms_norm(wide[:, 100:200], weight, 1e-5), expected)


def test_norm_adds_its_epsilon_to_the_mean_square(kernels: SimpleNamespace, normal: Normal, assert_near: Any) -> None:
    x, weight = normal(2, 64) * 1e-3, normal(64).fill_(1)
    assert_near(
        kernels.norms.launch_rms_norm(x, weight, 1.0), x.double() / (x.double().square().mean(-1, True) + 1) ** 0.5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 896])
def test_norm_behind_a_sum_returns_the_sum_too(
    kernels: SimpleNamespace, normal: Normal, assert_near: Any, width: int, dtype: torch.dtype
) -> None:
    x, residual, weight = (
        normal(3, width, dtype=dtype),
        normal(3, width, dtype=dtype, seed=2),
        normal(width, dtype=dtype),
    )
    y, total = kernels.norms.launch_add_rms_norm(x, residual, weight, 1e-6)
    assert_near(total, x.double() + residual.double())
    # The norm is that of the rounded sum, which is the residual of the next layer.
    assert_near(y, kernels.norms.rms_norm_reference(total.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 1024, 1500, 14336])
def test_gate_matches_the_reference(
    kernels: SimpleNamespace, normal: Normal, assert_near: Any, width: int, dtype: torch.dtype
) -> None:
    gate_up = normal(3, 2 * width, dtype=dtype) * 4
    assert_near(kernels.gated.launch_silu_mul(gate_up), kernels.gated.silu_mul_reference(gate_up.double()))


def test_fused_kernels_take_no_rows(kernels: SimpleNamespace, normal: Normal) -> None:
    x, weight = normal(0, 64), normal(64)
    assert kernels.norms.launch_rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert kernels.norms.launch_add_rms_norm(x, x, weight, 1e-5)[1].shape == (0, 64)
    assert kernels.gated.launch_silu_mul(x).shape == (0, 32)


def test_a_row_of_a_norm_is_bit_identical_alone(kernels: SimpleNamespace, normal: Normal) -> None:
    x, weight = normal(4, 136), normal(136, seed=1)
    together = kernels.norms.launch_rms_norm(x, weight, 1e-5)
    for i in range(4):
        assert torch.equal(kernels.norms.launch_rms_norm(x[i : i + 1], weight, 1e-5)[0], together[i])


def rotary_table(positions: int, head_dim: int) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_case(
    normal: Normal, heads: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype, norm: bool
) -> tuple[torch.Tensor, ...]:
    """qkv, positions, rotary, q_norm, k_norm, pages and slots of five rows; the last one stores nothing."""
    qkv = normal(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    device = qkv.device
    positions = torch.tensor([0, 1, 9, 40, 0], device=device)
    pages = torch.full((6, 2, page_tokens, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    places = [2 * page_tokens * 4 + 3, 0, 2 * page_tokens * 5 + page_tokens - 1, 2 * page_tokens * 2, -1]
    slots = torch.tensor(places, device=device)
    weights = [normal(head_dim, dtype=dtype, seed=seed) if norm else None for seed in (3, 4)]
    return qkv, positions, rotary_table(41, head_dim).to(device), *weights, pages, slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 3, 80), (14, 2, 96), (40, 8, 128), (2, 1, 256)]
)
def test_rotation_and_write_match_the_reference(
    kernels: SimpleNamespace,
    normal: Normal,
    assert_near: Any,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: bool,
    dtype: torch.dtype,
) -> None:
    qkv, positions, rotary, q_norm, k_norm, pages, slots = rope_case(normal, heads, kv_heads, head_dim, 8, dtype, norm)
    wide = [None if t is None else t.double() for t in (qkv, rotary, q_norm, k_norm, pages)]
    expected = kernels.rope.rope_write_reference(wide[0], positions, *wide[1:4], 1e-6, wide[4], slots)
    q = kernels.rope.launch_rope_write(qkv, positions, rotary, q_norm, k_norm, 1e-6, pages, slots)
    assert_near(q, expected)
    assert torch.equal(pages.isnan(), wide[4].isnan())
    assert_near(pages[~pages.isnan()], wide[4][~pages.isnan()])
    assert (~pages.isnan()).sum() == 4 * 2 * kv_heads * head_dim


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_values_are_stored_as_they_are(
    kernels: SimpleNamespace, normal: Normal, page_tokens: int, index: torch.dtype
) -> None:
    qkv, positions, rotary, _, _, pages, slots = rope_case(normal, 2, 2, 64, page_tokens, torch.float16, False)
    kernels.rope.launch_rope_write(qkv, positions.to(index), rotary, None, None, 1e-6, pages, slots.to(index))
    values = qkv.view(5, 6, 64)[:, 4:]
    assert torch.equal(pages[4, 1, 3], values[0])
    assert torch.equal(pages[0, 1, 0], values[1])
    assert torch.equal(pages[5, 1, page_tokens - 1], values[2])


def test_pages_that_cannot_be_written_in_place_are_refused(kernels: SimpleNamespace, normal: Normal) -> None:
    qkv, positions, rotary, _, _, pages, slots = rope_case(normal, 2, 2, 64, 8, torch.float32, False)
    with pytest.raises(ValueError, match="pages: keys are written in place"):
        kernels.rope.launch_rope_write(qkv, positions, rotary, None, None, 1e-6, pages.transpose(2, 3), slots)
