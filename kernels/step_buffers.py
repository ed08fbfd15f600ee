"""The arrays of a step in one buffer, so that one copy brings all of them to the device.

A layout gives every array a place of fixed size: a captured graph finds the next step's arrays where it found the last
one's. The host fills one of several page-locked buffers in turn, as the copy of the last one may still be under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_ALIGNMENT = 4
"""Elements, so that every array begins at 16 bytes."""

_RING = 3
"""Buffers of the host: one that is filled, one that is copied, and one to spare."""


@dataclass(frozen=True, slots=True)
class Field:
    """An array of a step: its shape at most, its dtype (int32 or float32), and what fills the rest of it.

    ``padding`` None repeats the last element; of a matrix it is a row.
    """

    shape: tuple[int, ...]
    is_float: bool = False
    padding: int | tuple[int, ...] | None = 0


class BufferLayout:
    """Where each array of a step lies.

    Args:
        fields: by name.

    Attributes:
        fields: as given.
        size: of the buffer, in elements of four bytes.
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self.fields = dict(fields)
        self._starts: dict[str, int] = {}
        self.size = 0
        for name, field in self.fields.items():
            self._starts[name] = self.size
            self.size += -(-prod(field.shape) // _ALIGNMENT) * _ALIGNMENT

    def fill(self, buffer: npt.NDArray[np.int32], arrays: Mapping[str, Array]) -> None:
        """Write arrays, each to the front of its place, and pad.

        Args:
            buffer: [size] int32.
            arrays: one for each field; along the first dimension at most as long, along the others equally.

        Raises:
            ValueError: an array is longer than its place.
        """
        for name, field in self.fields.items():
            start, array = self._starts[name], arrays[name]
            place = buffer[start : start + prod(field.shape)]
            if field.is_float:
                place = place.view(np.float32)
            used = array.size
            if used > place.size:
                raise ValueError(f"{name}: {array.shape} does not fit {field.shape}")
            place[:used] = array.ravel()
            if used < place.size:
                rest = place[used:].reshape(-1, *field.shape[1:])
                rest[:] = (place[used - 1] if used else 0) if field.padding is None else field.padding

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as tensors over ``buffer [size]`` int32."""
        found = {}
        for name, field in self.fields.items():
            start = self._starts[name]
            flat = buffer[start : start + prod(field.shape)]
            found[name] = (flat.view(torch.float32) if field.is_float else flat).view(field.shape)
        return found


class HostRing:
    """Buffers of the host that are copied to a device in turn.

    A buffer is written again only once its last copy is done, which is long past where one step follows another.

    Args:
        device: where to; on the CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32) for _ in range(_RING)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._events: list[Any] = [torch.cuda.Event() if self._pinned else None for _ in range(_RING)]
        self._turn = 0

    def next(self, size: int) -> tuple[torch.Tensor, npt.NDArray[np.int32]]:
        """[size] int32 to write to until ``send``, at least so many elements: a tensor, and an array over the same."""
        self._turn = turn = (self._turn + 1) % _RING
        if self._pinned:
            self._events[turn].synchronize()
        if self._arrays[turn].size < size:
            self._buffers[turn] = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._pinned)
            self._arrays[turn] = self._buffers[turn].numpy()
        return self._buffers[turn], self._arrays[turn]

    def send(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Queue copies from parts of the buffer that ``next`` gave last to tensors of the device."""
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        if self._pinned:
            self._events[self._turn].record()
