"""Which adapters are where, by name, for those who route requests between servers. Bounded, whatever is registered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.engine_client import EngineClient
from loraplex.server.exposition import Rows
from loraplex.server.messages import AdapterState

TIERS = ("pool", "host")


class HeldAdapter(NamedTuple):
    """An adapter in the pool or on the host; ``rank`` is 0 where it is not known."""

    name: str
    tier: str
    pinned: bool
    rank: int


class AdapterSeries:
    """Names the adapters in the pool that came or were in use last, then those that came to the host last.

    Args:
        engine: tells where adapters are.
        registry: knows their names.
        limit: so many are named at most.
    """

    def __init__(self, engine: EngineClient, registry: AdapterRegistry, limit: int) -> None:
        self._engine = engine
        self._registry = registry
        self._limit = limit
        self._here: dict[str, OrderedDict[tuple[str, int], None]] = {tier: OrderedDict() for tier in TIERS}
        self._seen = (-1, -1)
        self._held: tuple[HeldAdapter, ...] = ()
        self._shown: tuple[tuple[HeldAdapter, ...], Rows] = (self._held, _family_of(self._held))
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

    def held(self) -> tuple[HeldAdapter, ...]:
        """Those that are named now, the pool's first; the same object for as long as nothing changes.

        Costs time in proportion to the limit when something has changed, and to open requests where the pool holds more
        adapters than that.
        """
        seen = self._engine.adapters.version, self._registry.version
        if seen == self._seen and not self._note_use():
            return self._held
        self._seen = seen
        found = islice(self._newest(), self._limit)
        held = tuple(sorted(found, key=lambda one: (TIERS.index(one.tier), one)))
        if held != self._held:
            self._held = held
        return self._held

    def wanted(self) -> list[str]:
        """Names of adapters that open requests ask for and that are not in the pool; no more than the limit."""
        return sorted(islice(self._missing(), self._limit))

    def family(self) -> Rows:
        """The held adapters as a metric; the same object for as long as nothing changes."""
        held = self.held()
        if held is not self._shown[0]:
            self._shown = held, _family_of(held)
        return self._shown[1]

    def _note_use(self) -> bool:
        """Of more than can be named, those in use come first, however long ago they came. Returns whether there are."""
        pool = self._here["pool"]
        if len(pool) <= self._limit:
            return False
        for key in self._engine.wanted:
            if key in pool:
                pool.move_to_end(key)
        return True

    def _missing(self) -> Iterator[str]:
        for key in self._engine.wanted:
            name = self._registry.name_at(key)
            if name is not None and self._engine.adapters.state_at(key).tier != "pool":
                yield name

    def _newest(self) -> Iterator[HeldAdapter]:
        for tier, here in self._here.items():
            gone: list[tuple[str, int]] = []
            try:
                for key in reversed(here):
                    state, name = self._engine.adapters.state_at(key), self._registry.name_at(key)
                    if state.tier != tier:
                        gone.append(key)
                    elif name is not None:  # one that is still being verified gets its name in a moment
                        rank = 0 if state.info is None else state.info.rank
                        yield HeldAdapter(name, tier, state.pinned, rank)
            finally:
                for key in gone:
                    del here[key]


def _family_of(held: Sequence[HeldAdapter]) -> Rows:
    family = Rows(
        "loraplex_adapter_held",
        "Adapters by where they are, those in the pool first; no more than max_adapter_series.",
        "gauge",
        ("adapter", "tier", "pinned"),
    )
    for one in held:
        family.add_metric((one.name, one.tier, str(one.pinned).lower()), 1)
    return family
