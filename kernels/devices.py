"""Which devices this version is made for."""

from __future__ import annotations

import torch

from loraplex.kernels import ops

_OPERATORS = (ops.shrink, ops.expand, ops.write_kv, ops.decode_attention, ops.prefill_attention)


def has_kernels_for(device_type: str) -> bool:
    """Whether the operators are fast on a device: it is a CPU, or there are kernels made for each of them."""
    if device_type == "cpu":
        return True
    key = device_type.upper()
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"loraplex::{operator.__name__}", key) for operator in _OPERATORS
    )
