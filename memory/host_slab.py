"""The host store's memory: one allocation of blocks, a block being one page of one layer.

An image of L layers and n pages takes L * n blocks, in one run where there is one, else in few runs of whole layers.
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from loraplex.memory.free_runs import FreeRuns

_log = logging.getLogger(__name__)


class SlabRoom:
    """The room of one image. Its blocks are free again when nobody holds it any more.

    Copies to a GPU go on while an image leaves the store: who still reads an image holds it, and with it its room.

    Attributes:
        parts: [layers, num_pages, page_elems] each, uninitialised; together all layers.
        runs: their blocks.
    """

    __slots__ = ("_give_back", "_key", "parts", "runs")

    def __init__(
        self, key: int, runs: tuple[range, ...], parts: tuple[torch.Tensor, ...], give_back: Callable[[int], None]
    ) -> None:
        self.parts = parts
        self.runs = runs
        self._key = key
        self._give_back = give_back

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.runs))

    def __del__(self) -> None:
        self._give_back(self._key)


class HostSlab:
    """Blocks of host memory, given out in runs. Not thread-safe, but rooms may be let go anywhere.

    On a machine that overcommits, memory is taken when it is first written. For copies to CUDA all of it is locked at
    once, in place: a pinned allocation of PyTorch's would be rounded up to a power of two.

    Args:
        byte_limit: rounded down to blocks.
        page_elems: elements of a page in one layer.
        dtype: of the served model.
        page_locked: lock the memory, where that can be done.
        on_return: called when blocks have come free, by whoever let go of them; quick, and safe to be interrupted by
            itself.

    Errors: ValueError for more bytes than the machine gives.
    """

    def __init__(
        self,
        byte_limit: int,
        page_elems: int,
        dtype: torch.dtype,
        *,
        page_locked: bool = False,
        on_return: Callable[[], None] | None = None,
    ) -> None:
        self.block_bytes = page_elems * dtype.itemsize
        self.num_blocks = byte_limit // self.block_bytes
        self._blocks = _reserve(self.num_blocks * self.block_bytes, dtype).view(self.num_blocks, page_elems)
        self._free = FreeRuns(self.num_blocks)
        self._taken: dict[int, tuple[range, ...]] = {}
        self._num_taken = self._next_key = 0
        self._returned = deque[int]()
        self._on_return = on_return
        self._is_locked = page_locked and self.num_blocks > 0 and _lock(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that could be taken."""
        self._collect()
        return self.num_blocks - self._num_taken

    @property
    def used_bytes(self) -> int:
        """Of all blocks that are not free."""
        return (self.num_blocks - self.num_free) * self.block_bytes

    def allocate(self, num_layers: int, num_pages: int) -> SlabRoom | None:
        """Room for an image of at least one page; None where there are not as many blocks in runs of whole layers."""
        if num_layers * num_pages > self.num_free:
            return None
        runs = self._take(num_layers, num_pages)
        if runs is None:
            return None
        key, self._next_key = self._next_key, self._next_key + 1
        self._taken[key] = runs
        self._num_taken += num_layers * num_pages
        shape = (-1, num_pages, self._blocks.shape[1])
        parts = tuple(self._blocks[run.start : run.stop].view(shape) for run in runs)
        return SlabRoom(key, runs, parts, self._give_back)

    def would_fit(self, num_layers: int, num_pages: int, others: Iterable[SlabRoom]) -> bool:
        """Whether there would be room for an image if there were nothing but these others."""
        taken = sorted((run.start, run.stop) for room in others for run in room.runs)
        layers, end = 0, 0
        for start, stop in [*taken, (self.num_blocks, self.num_blocks)]:
            layers += (start - end) // num_pages
            end = stop
        return layers >= num_layers

    def _take(self, num_layers: int, num_pages: int) -> tuple[range, ...] | None:
        """Runs of whole layers, or none at all. The largest are cut first, so that there are few of them."""
        whole = self._free.take_fitting(num_layers * num_pages)
        if whole is not None:
            return (whole,)
        runs: list[range] = []
        missing = num_layers * num_pages
        while missing > 0:
            run = self._take_layers(missing, num_pages)
            if run is None:
                self._put_back(runs)
                return None
            runs.append(run)
            missing -= len(run)
        return tuple(_joined(runs))

    def _take_layers(self, limit: int, num_pages: int) -> range | None:
        """One run of whole layers, up to ``limit`` blocks."""
        if not any(True for _ in self._free):
            return None
        run = self._free.take_largest(limit)
        spare = len(run) % num_pages
        if spare:
            self._free.add(run.start, spare)
        if len(run) > spare:
            return run[spare:]
        return self._free.take_fitting(num_pages)

    def _put_back(self, runs: Sequence[range]) -> None:
        for run in runs:
            self._free.add(run.start, len(run))

    def _give_back(self, key: int) -> None:
        # This may run within any other method, when the last reference goes: it touches nothing that they do.
        self._returned.append(key)
        if self._on_return is not None:
            self._on_return()

    def _collect(self) -> None:
        while self._returned:
            runs = self._taken.pop(self._returned.popleft())
            self._put_back(runs)
            self._num_taken -= sum(map(len, runs))

    def close(self) -> None:
        """Unlock the memory. No copy from it may be under way."""
        if self._is_locked:
            self._is_locked = False
            _cuda_runtime().cudaHostUnregister(self._blocks.data_ptr())

    def check_integrity(self, rooms: Iterable[SlabRoom]) -> None:
        """AssertionError unless each block is free or in one room, and those of ``rooms`` are among them."""
        self._collect()
        self._free.check_integrity()
        free = [block for first, length in self._free for block in range(first, first + length)]
        taken = [block for runs in self._taken.values() for run in runs for block in run]
        assert len(taken) == self._num_taken
        assert sorted(free + taken) == list(range(self.num_blocks)), "a block has two owners, or none"
        known = set(self._taken.values())
        assert all(room.runs in known for room in rooms)


def _joined(runs: Iterable[range]) -> list[range]:
    """The same blocks in ascending order, in as few runs as they make."""
    joined: list[range] = []
    for run in sorted(runs, key=lambda run: run.start):
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def _reserve(num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this process alone that is taken as it is written.

    torch's own would be written at once where torch is told to fill what it allocates.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(
            f"byte_limit: {num_bytes} bytes of host memory cannot be reserved ({error.strerror}); expected no more "
            "than the machine has"
        ) from error
    return torch.frombuffer(memory, dtype=dtype)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _lock(blocks: torch.Tensor) -> bool:
    """Page-lock memory for CUDA; False, and a warning, where that fails."""
    try:
        result = int(_cuda_runtime().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0))
        problem = None if result == 0 else f"CUDA error {result}"
    except (RuntimeError, AssertionError) as error:
        problem = str(error)
    if problem is None:
        return True
    _log.warning(
        "%d bytes of host memory for adapters could not be page-locked (%s); copies to the GPU will be slower and hold "
        "up the step loop. Lower host_adapter_bytes, or raise the limit on locked memory (ulimit -l).",
        blocks.nbytes,
        problem,
    )
    return False
