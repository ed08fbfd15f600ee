from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from loraplex.memory.arrival_rates import ArrivalRates

EVENTS = 12_000


@pytest.fixture(scope="module")
def traces() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "bench" / "eviction_traces.py"
    spec = importlib.util.spec_from_file_location("eviction_traces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["eviction_traces"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def ratio(traces: ModuleType, name: str, *, count: int = 300, rate: float = 10.0, share: float = 0.25) -> float:
    """Time lost by the order by worth over time lost by least recent use, with arrivals remembered as by default."""
    trace = traces.TRACES[name](count, rate, EVENTS / rate)
    things = traces.mixed_things(count)
    lru = traces.seconds_lost(trace, things, share, None)
    assert lru > 0
    found = traces.seconds_lost(trace, things, share, ArrivalRates()._memory_seconds)
    return float(found / lru)


@pytest.mark.parametrize("name", ["stationary", "drifting"])
@pytest.mark.parametrize("share", [0.1, 0.25])
def test_where_some_are_wanted_more_worth_loses_less_time_than_recency(
    traces: ModuleType, name: str, share: float
) -> None:
    assert ratio(traces, name, share=share) <= 0.8  # 0.48 to 0.64


@pytest.mark.parametrize("name", ["bursts", "moving", "looping"])
@pytest.mark.parametrize("rate", [2.0, 20.0])
def test_where_only_recency_tells_worth_loses_little(traces: ModuleType, name: str, rate: float) -> None:
    assert ratio(traces, name, rate=rate) <= 1.15  # up to 1.00


def test_arrivals_remembered_for_too_long_keep_what_was_wanted_once(traces: ModuleType) -> None:
    trace, things = traces.moving(300, 20.0, EVENTS / 20), traces.mixed_things(300)
    lost = [traces.seconds_lost(trace, things, 0.1, memory) for memory in (None, 30.0, 3600.0)]
    assert lost[1] <= 1.15 * lost[0]
    assert lost[2] > 2 * lost[0]
