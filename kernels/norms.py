"""RMSNorm, https://arxiv.org/abs/1910.07467, alone and behind a residual addition."""

from __future__ import annotations

import torch

from loraplex.kernels.triton_runtime import jit, power_of_two, register_operator, tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in float32, rounded to the dtype of ``x``, then times ``weight``.

    Args:
        x: [rows, hidden].
        weight: [hidden], same dtype.

    Returns:
        [rows, hidden], same dtype.
    """
    y: torch.Tensor = torch.ops.loraplex.rms_norm(x, weight, eps)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual`` in their dtype, and ``rms_norm(s)``: one pass over memory instead of two.

    Args:
        x, residual: [rows, hidden].
        weight: [hidden], same dtype.

    Returns:
        ``rms_norm(s, weight, eps)`` and ``s``, both [rows, hidden].
    """
    y, total = torch.ops.loraplex.add_rms_norm(x, residual, weight, eps)
    return y, total


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The plain form, in float32 or the float64 of its inputs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain form."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


@jit
def _norm_row(
    x_ptr: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N_PAD)
    inside = n < N
    x = tl.load(x_ptr + row * stride + n, mask=inside, other=0.0)
    if ADD:
        # Rounded before it is squared: the norm is that of the sum that is kept.
        x = (x.to(tl.float32) + tl.load(residual + row * N + n, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total + row * N + n, x, mask=inside)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)).to(x.dtype).to(tl.float32)
    y = normed * tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, y, mask=inside)


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm`` by one program per row; rows may be strided."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(x):
        n, warps = x.shape[1], _warps(x.shape[1])
        _norm_row[(len(x),)](
            x, x, weight, out, out, x.stride(0), eps, N=n, N_PAD=power_of_two(n), ADD=False, num_warps=warps
        )
    return out


def launch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm`` by one program per row."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    if len(x):
        n, warps = x.shape[1], _warps(x.shape[1])
        _norm_row[(len(x),)](
            x, residual, weight, out, total, n, eps, N=n, N_PAD=power_of_two(n), ADD=True, num_warps=warps
        )
    return out, total


def _warps(n: int) -> int:
    """About 16 elements a thread, so that a row of 16-byte accesses is in flight at once."""
    return min(16, max(1, power_of_two(n) // 512))


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(x), _fake(x)


register_operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=rms_norm_reference,
    launch=launch_rms_norm,
    fake=_fake,
)
register_operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=add_rms_norm_reference,
    launch=launch_add_rms_norm,
    fake=_fake_add,
)
