"""Host stores over a reader and a clock of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, LowRankPair, TokenRoutes
from loraplex.memory.adapter_store import AdapterStore, Loading, Ready

SHAPE = BaseShape(1, {"q_proj": (128, 128)}, {})
UNIT = 2 * 128 * 4
"""Bytes of an image of rank 1: a row of A and one of B in float32, a block of the slab each."""


def spec_of(identity: str, rank: int = 1, *, kind: str = "lora", routes: TokenRoutes | None = None) -> AdapterSpec:
    pair = LowRankPair("q_proj", 0, torch.ones(rank, 128), torch.ones(128, rank), 1.0)
    return AdapterSpec(identity, kind, (pair,), ("a warning",), token_routes=routes)


class FakeReader:
    """Reads paths such as "name", "name:rank" or "name:rank/copy"; one that starts with "!" fails.

    Can be held up, and notes what it reads.

    Attributes:
        swapped: by path, the name of what lies there instead.
        faults: by path, what the next reads raise.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.active: list[str] = []
        self.overlaps = 0
        self.swapped: dict[str, str] = {}
        self.faults: dict[str, list[BaseException]] = {}

    def __call__(self, path: str) -> AdapterSpec:
        self.calls.append(path)
        self.overlaps += path in self.active
        self.active.append(path)
        try:
            assert self.gate.wait(30)
        finally:
            self.active.remove(path)
        if self.faults.get(path):
            raise self.faults[path].pop(0)
        if path.startswith("!"):
            raise AdapterFileError(f"{path} is broken", key="tensor")
        name, _, rank = path.partition("/")[0].partition(":")
        return spec_of(self.swapped.get(path, name), int(rank or 1))


class Harness:
    """Stores over a fake reader, a clock of ours and pauses that only are noted."""

    unit = UNIT
    shape = SHAPE
    spec_of = staticmethod(spec_of)

    def __init__(self) -> None:
        self.reader = FakeReader()
        self.now = 100.0
        self.pauses: list[float] = []
        self.stores: list[AdapterStore] = []

    def store(self, *, units: int = 10, **options: Any) -> AdapterStore:
        options = {"reader": self.reader, "clock": lambda: self.now, "sleep": self.pauses.append, **options}
        store = AdapterStore(SHAPE, 128, torch.float32, byte_limit=units * UNIT, **options)
        self.stores.append(store)
        return store

    def load(self, store: AdapterStore, path: str, revision: int = 0) -> Ready:
        state = self.load_any(store, path, revision)
        assert isinstance(state, Ready), state
        return state

    def load_any(self, store: AdapterStore, path: str, revision: int = 0) -> Any:
        store.request(path, revision)
        self.wait_until(lambda: not isinstance(store.state(path, revision), Loading))
        return store.state(path, revision)

    @staticmethod
    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "nothing happened for too long"
            time.sleep(0.0005)

    def close(self) -> None:
        self.reader.gate.set()
        for store in self.stores:
            store.close()
            store.check_integrity()


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def make_harness() -> Callable[[], Harness]:
    return Harness
