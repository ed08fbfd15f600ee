"""Which adapters are where, by name, for those who route requests between servers. Bounded, whatever is registered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.engine_client import EngineClient
from loraplex.server.messages import AdapterState

TIERS = ("pool", "host")


class AdapterSeries:
    """One series for each of the adapters that came into the pool last, then of those that came to the host last.

    Args:
        engine: tells where adapters are.
        registry: knows their names.
        limit: so many series at most.
    """

    def __init__(self, engine: EngineClient, registry: AdapterRegistry, limit: int) -> None:
        self._engine = engine
        self._registry = registry
        self._limit = limit
        self._here: dict[str, OrderedDict[tuple[str, int], None]] = {tier: OrderedDict() for tier in TIERS}
        engine.adapters.on_states.append(self._note)

    def _note(self, states: Sequence[AdapterState]) -> None:
        for state in states:
            key = (state.path, state.revision)
            for tier, here in self._here.items():
                if tier == state.tier:
                    here[key] = None
                    here.move_to_end(key)
                else:
                    here.pop(key, None)

    def family(self) -> Metric:
        """The series, as they are now. Costs time in proportion to the limit."""
        family = GaugeMetricFamily(
            "loraplex_adapter_held",
            "Adapters by where they are, those in the pool first; no more than max_adapter_series.",
            labels=("adapter", "tier", "pinned"),
        )
        left = self._limit
        for state, name in self._held():
            if left <= 0:
                break
            family.add_metric((name, state.tier, str(state.pinned).lower()), 1)
            left -= 1
        return family

    def _held(self) -> Iterator[tuple[AdapterState, str]]:
        for tier, here in self._here.items():
            gone: list[tuple[str, int]] = []
            try:
                for key in reversed(here):
                    state, name = self._engine.adapters.state_at(key), self._registry.name_at(key)
                    if state.tier != tier:
                        gone.append(key)
                    elif name is not None:  # one that is still being verified gets its name in a moment
                        yield state, name
            finally:
                for key in gone:
                    del here[key]
