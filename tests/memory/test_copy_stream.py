"""The queue of copies as CUDA's streams: what is asked of them, on a stand-in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loraplex.memory.copy_stream import CudaCopyStream


class FakeCuda:
    """Stands for ``torch.cuda``: notes what is asked of it, and has no call that makes the host wait."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "compute"

    def install(self, patches: pytest.MonkeyPatch) -> None:
        patches.setattr(torch.cuda, "Stream", lambda device: self.Stream(self, "copy"))
        patches.setattr(torch.cuda, "Event", lambda enable_timing: self.Event(self))
        patches.setattr(torch.cuda, "current_stream", lambda device: self.Stream(self, self.current))
        patches.setattr(torch.cuda, "stream", self.stream)
        patches.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patches.setattr(torch.cuda, "synchronize", None)

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    class Stream:
        def __init__(self, cuda: FakeCuda, name: str) -> None:
            self.cuda, self.name = cuda, name

        def wait_stream(self, other: Any) -> None:
            self.cuda.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Any) -> None:
            self.cuda.log.append(f"{self.name} waits for an event of {event.stream}")

    class Event:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda, self.stream = cuda, ""

        def record(self, stream: Any) -> None:
            self.stream = stream.name
            self.cuda.log.append(f"{stream.name} records")

        def query(self) -> bool:
            return False

        def elapsed_time(self, later: Any) -> float:
            return 2500.0


def test_the_cuda_stream_queues_copies_behind_the_current_stream_and_makes_it_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    stream = CudaCopyStream(torch.device("cpu"))
    stream.follow()
    begun = stream.record(timed=True)
    arena, data = torch.zeros(2, 6, 3), torch.randn(2, 2, 3)
    stream.copy([(arena[0, 1:3], data[0])])
    stream.scatter(arena, stream.index([5, 4]), data)
    event = stream.record(timed=True)
    event.hold_back()
    assert cuda.log == [
        "copy waits for compute",
        "copy records",
        "copy records",
        "compute waits for an event of copy",
    ]
    assert torch.equal(arena[0, 1:3], data[0])
    assert torch.equal(arena[:, [5, 4]], data)
    assert not event.is_done()
    assert event.seconds_since(begun) == 2.5
    assert cuda.current == "compute"
