from __future__ import annotations

from typing import Any

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_series import AdapterSeries


def test_an_adapter_that_is_told_of_before_it_has_a_name_is_listed_once_it_has(engine: Any) -> None:
    registry = AdapterRegistry("base")
    series = AdapterSeries(engine, registry, 10)
    ref = registry.new_ref("red", "/red")
    engine.tell(ref)
    assert not series.family().samples
    registry.register(ref)
    assert [sample.labels["adapter"] for sample in series.family().samples] == ["red"]
    registry.remove("red")
    engine.adapters.forget(ref)
    assert not series.family().samples
