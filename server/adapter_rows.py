"""Which adapters act on which rows of a step, sorted into the batches that the kernels take.

A row is *direct* if one adapter acts on it with weight 1: its plain pairs apply to rows that stand together. Rows under
a mix and rows of token-wise adapters are *listed*: any number of entries each. Adapters with routers have their rows
*routed* in the forward pass besides. What stays the same from step to step, as while decoding, is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.kernels.lora_plan import AdapterBatch, EntryBatch, Segment, Unit, UnitSet, sort_entries
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.kernels.router_plan import RoutedBatch, RoutedRows
from loraplex.kernels.step_adapters import RouteLog, RouteRecord, StepAdapters

Assignment = tuple[tuple[ResidentAdapter, float], ...]
"""The adapters of a row with their weights; none for the base model."""


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows [start, stop) of a step under one assignment."""

    assignment: Assignment
    start: int
    stop: int

    @property
    def rows(self) -> Int64Array:
        return np.arange(self.start, self.stop)


def direct_adapter(assignment: Assignment) -> ResidentAdapter | None:
    """The adapter whose rows are to stand together, if it is one."""
    if len(assignment) != 1 or assignment[0][1] != 1.0 or _scope(assignment[0][0]) == "token":
        return None
    return assignment[0][0]


def _scope(adapter: ResidentAdapter) -> str | None:
    return None if adapter.routing is None else adapter.routing.scope


class AdapterRows:
    """Makes the adapters' batches of one row space: all rows of steps, or those whose logits are wanted.

    Args:
        device: where index tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: list[Segment] = []
        self._direct: EntryBatch | None = None
        self._listed: EntryBatch | None = None
        self._routed: dict[str, RoutedBatch] = {}
        self._units: dict[str, UnitSet] = {}

    def make(
        self,
        segments: list[Segment],
        placed: Sequence[PlacedRows],
        tokens: Int64Array,
        log: RouteLog | None = None,
        *,
        routes: bool = True,
    ) -> StepAdapters | None:
        """The adapters of a step; None where no row has one.

        Args:
            segments: the direct rows.
            placed: all rows that have adapters.
            tokens: [rows] of the step.
            log: where choices are to be noted.
            routes: False for rows at which no layer runs.
        """
        if not placed:
            return None
        listed = [rows for rows in placed if direct_adapter(rows.assignment) is None]
        return StepAdapters(
            direct=self._keep_direct(segments),
            listed=self._keep_listed(listed, tokens, log) if listed else None,
            linear=self._keep_routed(placed, "linear") if routes else None,
            ffn=self._keep_routed(placed, "ffn") if routes else None,
            log=log,
        )

    def _keep_direct(self, segments: list[Segment]) -> EntryBatch | None:
        if segments != self._segments:
            self._segments = segments
            self._direct = AdapterBatch(segments, self._device) if segments else None
        return self._direct

    def _keep_listed(self, listed: Sequence[PlacedRows], tokens: Int64Array, log: RouteLog | None) -> EntryBatch:
        units = self._keep_units("listed", {adapter: None for rows in listed for adapter, _ in rows.assignment})
        entries = [
            _entries(rows, adapter, weight, units.first(adapter), tokens, log)
            for rows in listed
            for adapter, weight in rows.assignment
        ]
        found, _ = sort_entries(
            np.concatenate([unit for unit, _, _ in entries]),
            np.concatenate([row for _, row, _ in entries]),
            np.concatenate([weight for _, _, weight in entries]),
            len(units.units),
        )
        last = self._listed
        if last is None or last.units is not units or not last.entries.same_as(found):
            self._listed = last = EntryBatch(units, found)
        return last

    def _keep_units(self, use: str, adapters: Mapping[ResidentAdapter, None]) -> UnitSet:
        """The units of these adapters: the last ones, as long as they cover them, since making them takes time."""
        last = self._units.get(use)
        if last is None or not last.covers(adapters):
            last = self._units[use] = UnitSet(_units(adapters, routed=use != "listed"), self._device)
        return last

    def _keep_routed(self, placed: Sequence[PlacedRows], scope: str) -> RoutedBatch | None:
        rows: dict[tuple[ResidentAdapter, float], list[Int64Array]] = {}
        for some in placed:
            for adapter, weight in some.assignment:
                if _scope(adapter) == scope:
                    rows.setdefault((adapter, weight), []).append(some.rows)
        if not rows:
            return None
        parts = [RoutedRows(adapter, np.concatenate(some), weight) for (adapter, weight), some in rows.items()]
        units = self._keep_units(scope, {adapter: None for adapter, _ in rows})
        last = self._routed.get(scope)
        if last is None or last.units is not units or not last.is_over(parts):
            last = self._routed[scope] = RoutedBatch(tuple(parts), units)
        return last


def _units(adapters: Iterable[ResidentAdapter], *, routed: bool) -> tuple[Unit, ...]:
    """The units of these adapters: each expert of one that is routed or token-wise, the plain pairs of any other."""
    units: list[Unit] = []
    for adapter in adapters:
        if adapter.routing is not None and (routed or adapter.routing.scope == "token"):
            units += [(adapter, expert) for expert in range(adapter.routing.num_experts)]
        else:
            units.append((adapter, None))
    return tuple(units)


def _entries(
    placed: PlacedRows,
    adapter: ResidentAdapter,
    weight: float,
    first_unit: int,
    tokens: Int64Array,
    log: RouteLog | None,
) -> tuple[Int64Array, Int64Array, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Units, rows and weights of the entries of one adapter on some rows."""
    rows = placed.rows
    routes = adapter.token_routes
    if routes is None:
        return np.full(len(rows), first_unit), rows, np.full(len(rows), weight, dtype=np.float32)
    here = tokens[placed.start : placed.stop]
    experts, weights = routes.experts.numpy()[here], routes.weights.numpy()[here]
    if log is not None:
        log.records.append(RouteRecord(None, "token", adapter, rows, experts, weights))
    units = first_unit + experts.astype(np.int64).ravel()
    return units, np.repeat(rows, experts.shape[1]), (weights * np.float32(weight)).ravel()
