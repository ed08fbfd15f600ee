"""The base model's linears: ``y = x W^T + b`` with the weight laid out as the device likes it.

On CPUs the weight is packed once into oneDNN's blocked layout, which is two to four times as fast as a plain product at
the few rows of a decode step (measured in ``docs/notebook.md``); elsewhere it stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ROWS_HINT = 16
"""Rows that the packed layout is chosen for: a decode step's."""

_SIZES_AN_OCTAVE = 8
"""Numbers of rows between a power of two and the next that a packed product is made for."""


class DenseLinear:
    """A frozen linear.

    Args:
        weight: [out_features, in_features]; not kept where it is packed.
        bias: [out_features] or None.
        pack: False keeps the weight as it is.
    """

    __slots__ = ("_packed", "_weight", "bias", "in_features", "out_features")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = pack and can_pack(weight)
        self._weight = _pack(weight) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if self._packed:
            rows = x.shape[0]
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x), self._weight, self.bias, "none", [], "")
            return y[:rows]
        return F.linear(x, self._weight, self.bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a fast product for this dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return has_fast_bfloat16()
    return weight.dtype == torch.float32


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware or in AVX-512 registers (AMX, AVX512-BF16, AVX-512)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computed_rows(rows: int) -> int:
    """Rows that a packed product of so many computes: at most an eighth more.

    oneDNN makes a product for each number of rows, which takes it up to a millisecond and 0.6 MB that it keeps; prefill
    steps would come in hundreds of numbers.
    """
    step = 1 << max(0, rows.bit_length() - _SIZES_AN_OCTAVE.bit_length())
    return -(-rows // step) * step


def _padded(x: torch.Tensor) -> torch.Tensor:
    rows, computed = x.shape[0], computed_rows(x.shape[0])
    return x if computed == rows else F.pad(x, (0, 0, 0, computed - rows))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
    return packed
