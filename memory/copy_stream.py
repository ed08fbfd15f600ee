"""A queue of copies to a GPU beside the stream that computes, and events by which the two wait for each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class CopyEvent(Protocol):
    """A mark in a queue of copies: passed once all that was queued before it is done."""

    def is_done(self) -> bool:
        """Whether it is passed; never waits."""

    def hold_back(self) -> None:
        """Let all that the computing stream is given from now on wait for this event. The host does not wait."""

    def seconds_since(self, earlier: CopyEvent) -> float:
        """Time between two events of one stream, both timed and done."""


class CopyStream(Protocol):
    """A queue of copies. Calls return at once; what they queue runs in order, beside the computing stream."""

    def follow(self) -> None:
        """Let the copies queued from now on wait for all that the computing stream has been given so far."""

    def index(self, positions: list[int]) -> torch.Tensor:
        """Positions on the device, [n] int64, for ``scatter``."""

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Queue copies of contiguous host tensors into contiguous device tensors, as (target, source)."""

    def scatter(self, target: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
        """Queue ``target[:, index] = source``: one copy to the device and one scatter there.

        Args:
            target: [layers, pages, elems] on the device.
            index: [n], of ``index``.
            source: [layers, n, elems] on the host, contiguous.
        """

    def record(self, *, timed: bool = False) -> CopyEvent:
        """Queue an event."""


class CudaCopyStream:
    """A CUDA stream for copies. The computing stream is the one that is current when a method is called.

    Copies from page-locked memory return before they are done; from other memory CUDA makes the host wait until it has
    been read. Nothing else here waits. What is copied from must live until an event recorded after the copy is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def index(self, positions: list[int]) -> torch.Tensor:
        # Memory that PyTorch allocates while the copy stream is current is given again to this stream alone, behind
        # what it has queued: neither the index nor a staged copy needs anyone who keeps it.
        with torch.cuda.stream(self._stream):
            return torch.tensor(positions).pin_memory().to(self._device, non_blocking=True)

    def copy(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)

    def scatter(self, target: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.index_copy_(1, index, source.to(self._device, non_blocking=True))

    def record(self, *, timed: bool = False) -> CudaCopyEvent:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return CudaCopyEvent(event, self._device)


class CudaCopyEvent:
    """An event of a ``CudaCopyStream``."""

    def __init__(self, event: Any, device: torch.device) -> None:
        self._event = event
        self._device = device

    def is_done(self) -> bool:
        return bool(self._event.query())

    def hold_back(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def seconds_since(self, earlier: CopyEvent) -> float:
        assert isinstance(earlier, CudaCopyEvent)
        return float(earlier._event.elapsed_time(self._event)) / 1000
