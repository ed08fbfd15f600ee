"""Arrays that the host makes and a device reads, what it reads back, and the rows of the arena that arrays name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.int64] | npt.NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """The array on a device; on the CPU without a copy where it is contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which is there once the device has got so far; a tensor of the host as it is."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def stored_rows(chunks: torch.Tensor, ids: npt.NDArray[np.int64], gather: torch.Tensor | None) -> torch.Tensor:
    """[rows, padded width] of the arena: gathered, or a view where ``ids [rows, stride]`` are one run.

    Args:
        chunks: [num_chunks, width of a chunk].
        gather: the ids on the device, [rows * stride]; None where they are one run.
    """
    if gather is not None:
        return chunks.index_select(0, gather).view(ids.shape[0], -1)
    first = int(ids[0, 0])
    return chunks[first : first + ids.size].view(ids.shape[0], -1)
