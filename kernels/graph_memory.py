"""Results of CUDA graphs that do not keep their memory from other graphs of the pool.

A tensor that was allocated while a graph was captured holds its place in the pool for as long as it lives. Graphs that
never run at once, and whose results are read before another one runs, can share the place instead.
"""

from __future__ import annotations

from typing import Any

import torch

_TYPE_NAMES = {torch.float32: "<f4", torch.float16: "<f2", torch.int32: "<i4", torch.int64: "<i8"}


class _Address:
    """Memory of a device as the interface has it that array libraries share
    (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "strides": None,
            "typestr": _TYPE_NAMES[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, in a tensor that does not own them.

    What it shows is right from each replay of the graph that the tensor was made in until the next replay of any graph
    of the pool, while the graph lives.

    Args:
        tensor: contiguous, on a CUDA device, of a dtype of ``_TYPE_NAMES``.

    Raises:
        ValueError: it is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return torch.as_tensor(_Address(tensor), device=tensor.device)
