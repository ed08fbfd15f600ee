"""The gate of a feed-forward network, ``silu(gate) * up``, https://arxiv.org/abs/2002.05202."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex.kernels.triton_runtime import jit, register_operator, tl, triton

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate_up[:, :I]) * gate_up[:, I:]``, in fp32 inside.

    Args:
        gate_up: [rows, 2 I].

    Returns:
        [rows, I], same dtype.
    """
    y: torch.Tensor = torch.ops.loraplex.silu_mul(gate_up)
    return y


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The plain form, in float32 or the float64 of its input."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@jit
def _silu_mul(x: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    gate = tl.load(x + row * 2 * width + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + n, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def launch_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu_mul`` by programs over rows and blocks of columns."""
    gate_up = gate_up.contiguous()
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    if rows:
        _silu_mul[(rows, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK, num_warps=4)
    return out


def _fake(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


register_operator(
    "silu_mul(Tensor gate_up) -> Tensor", reference=silu_mul_reference, launch=launch_silu_mul, fake=_fake
)
