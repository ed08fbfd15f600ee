"""The adapters' work of a step as lists for the kernels of a GPU (see ``kernels/lora_tiles.py``).

Most rows have one adapter and nothing else: their units are gathered from ``Lanes`` at once. Mixes, token-wise adapters
and adapters with routers are listed chunk by chunk. Lists are kept while the rows keep their units, as while decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.device_mixture import RoutedLists, list_routed
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.kernels.lora_tiles import EntryLists, list_entries
from loraplex.kernels.router_plan import RoutedRows
from loraplex.kernels.step_adapters import RouteLog, RouteRecord
from loraplex.server.lanes import NO_UNIT, Lanes
from loraplex.server.request import NEVER
from loraplex.server.step_plan import Chunk

Float32Array = npt.NDArray[np.float32]
Span = tuple[Chunk, int, int]
"""A chunk, and its rows [start, stop) of a row space."""


@dataclass(frozen=True, slots=True)
class StepEntries:
    """What adapters do to the rows of one row space.

    Attributes:
        lists: entries that are known before the step runs.
        linear: rows under adapters whose linears have routers of their own.
        ffn: rows under mixtures of feed-forward networks.
    """

    lists: EntryLists | None = None
    linear: RoutedLists | None = None
    ffn: RoutedLists | None = None

    @property
    def is_empty(self) -> bool:
        return self.lists is None and self.linear is None and self.ffn is None


@dataclass(slots=True)
class _Listed:
    """Entries under way."""

    units: list[Int64Array]
    rows: list[Int64Array]
    weights: list[Float32Array]

    def add(self, units: Int64Array, rows: Int64Array, weights: Float32Array) -> None:
        self.units.append(units)
        self.rows.append(rows)
        self.weights.append(weights)


class EntryMaker:
    """Makes the lists of one row space: all rows of steps, or those whose logits are wanted.

    Args:
        table: that has the adapters' units.
        lanes: of the sequences.
    """

    def __init__(self, table: AdapterTable, lanes: Lanes) -> None:
        self._table = table
        self._lanes = lanes
        self._key: tuple[int, Int64Array, npt.NDArray[np.bool_]] | None = None
        self._last = StepEntries()

    def make(
        self,
        lane_of_row: Int64Array,
        positions: Int64Array,
        special: Iterable[Span] = (),
        log: RouteLog | None = None,
        *,
        routes: bool = True,
        block_rows: int | None = None,
    ) -> StepEntries:
        """The entries of rows.

        Args:
            lane_of_row: [rows].
            positions: [rows] in their sequences.
            special: the chunks whose lanes are ``is_special``, with their rows, which stand in order of position.
            log: where choices that are known already are noted.
            routes: False for rows at which no layer runs.
            block_rows: entries of a tile at most; by default as ``choose_block_rows`` says.
        """
        lanes = self._lanes
        acts = positions >= lanes.acts_from[lane_of_row]
        if self._is_last(lane_of_row, acts):
            return self._last
        can_keep = not lanes.reads_tokens[lane_of_row].any()
        self._key = (lanes.version, lane_of_row, acts) if can_keep else None
        units = np.where(acts, lanes.units[lane_of_row], NO_UNIT)
        self._last = self._list_rows(units, positions, special, log, routes, block_rows)
        return self._last

    @property
    def keeps_all(self) -> bool:
        """Whether the last call's entries hold for the rows' next tokens too: adapters act on them, or never will."""
        if self._key is None:
            return False
        _, lanes, acts = self._key
        return bool((acts | (self._lanes.acts_from[lanes] == NEVER)).all())

    def _is_last(self, lane_of_row: Int64Array, acts: npt.NDArray[np.bool_]) -> bool:
        """Whether these are the rows of the last call, under the same adapters."""
        if self._key is None:
            return False
        version, last_lanes, last_acts = self._key
        return (
            version == self._lanes.version
            and np.array_equal(lane_of_row, last_lanes)
            and np.array_equal(acts, last_acts)
        )

    def _list_rows(
        self,
        units: Int64Array,
        positions: Int64Array,
        special: Iterable[Span],
        log: RouteLog | None,
        routes: bool,
        block_rows: int | None,
    ) -> StepEntries:
        rows = np.flatnonzero(units != NO_UNIT)
        spans = list(special)
        if not spans:
            return StepEntries(list_entries(units[rows], rows, block_rows=block_rows) if len(rows) else None)
        listed = _Listed([units[rows]], [rows], [np.ones(len(rows), dtype=np.float32)])
        routed: dict[str, dict[tuple[ResidentAdapter, float], list[Int64Array]]] = {"linear": {}, "ffn": {}}
        for chunk, start, stop in spans:
            acting = np.flatnonzero(positions[start:stop] >= chunk.adapter_start) + start
            if len(acting):
                self._list_chunk(chunk, acting, positions[acting], listed, routed, log)
        return StepEntries(
            self._list(listed, block_rows),
            self._route(routed["linear"]) if routes else None,
            self._route(routed["ffn"]) if routes else None,
        )

    def _list_chunk(
        self,
        chunk: Chunk,
        rows: Int64Array,
        positions: Int64Array,
        listed: _Listed,
        routed: dict[str, dict[tuple[ResidentAdapter, float], list[Int64Array]]],
        log: RouteLog | None,
    ) -> None:
        assignment = self._lanes.assignment(chunk)
        is_listed = self._lanes.is_listed(chunk)
        for adapter, weight in assignment:
            scope = None if adapter.routing is None else adapter.routing.scope
            if scope == "token":
                self._list_token_routes(chunk, adapter, weight, rows, positions, listed, log)
                continue
            if is_listed:
                unit = self._table.unit_of(adapter)
                listed.add(np.full(len(rows), unit), rows, np.full(len(rows), weight, dtype=np.float32))
            if scope is not None:
                routed[scope].setdefault((adapter, weight), []).append(rows)

    def _list_token_routes(
        self,
        chunk: Chunk,
        adapter: ResidentAdapter,
        weight: float,
        rows: Int64Array,
        positions: Int64Array,
        listed: _Listed,
        log: RouteLog | None,
    ) -> None:
        routes = adapter.token_routes
        assert routes is not None
        first = int(positions[0])
        tokens = np.array(chunk.sequence.token_slice(first, first + len(rows)), dtype=np.int64)
        experts, weights = routes.experts.numpy()[tokens], routes.weights.numpy()[tokens]
        if log is not None:
            log.records.append(RouteRecord(None, "token", adapter, rows, experts, weights))
        units = self._table.unit_of(adapter, 0) + experts.astype(np.int64).ravel()
        listed.add(units, np.repeat(rows, experts.shape[1]), (weights * np.float32(weight)).ravel())

    def _list(self, listed: _Listed, block_rows: int | None) -> EntryLists | None:
        units, rows = np.concatenate(listed.units), np.concatenate(listed.rows)
        if not len(units):
            return None
        return list_entries(units, rows, weights=np.concatenate(listed.weights), block_rows=block_rows)

    def _route(self, rows: dict[tuple[ResidentAdapter, float], list[Int64Array]]) -> RoutedLists | None:
        if not rows:
            return None
        parts = [RoutedRows(adapter, np.concatenate(some), weight) for (adapter, weight), some in rows.items()]
        return list_routed(parts, self._table)
