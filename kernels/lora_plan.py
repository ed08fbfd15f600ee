"""How the low-rank work of one step is grouped, for each group of sites.

A step's rows are sorted so that rows of one adapter stand together: first the rows without one, then the segments. A
short segment (decoding: one row or two per adapter) would waste a matrix product on each adapter, so all short segments
go through one shrink and one expand that gather the rows they need, whatever their ranks. A long segment (a prefill
chunk) is two matrix products over the adapter's matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter, SiteGroup
from loraplex.kernels.lora_work import EmbeddingRows, GroupPlan
from loraplex.kernels.unit_table import Entries, UnitTable

SHORT_SEGMENT_ROWS = 2
"""Segments of at most this many rows are gathered together."""

SHORT_UNIT_ENTRIES = 4
"""Units with at most this many scattered entries are gathered together."""

Unit = tuple[ResidentAdapter, int | None]
"""An adapter's own pairs (None), or those of one of its experts."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows [start, stop) of a step that one adapter applies to."""

    adapter: ResidentAdapter
    start: int
    stop: int

    @property
    def is_short(self) -> bool:
        return self.stop - self.start <= SHORT_SEGMENT_ROWS


@dataclass(eq=False, slots=True)
class UnitSet:
    """Units that stay the same for several steps, and their rows at each group."""

    units: tuple[Unit, ...]
    device: torch.device
    _tables: dict[tuple[object, ...], UnitTable] = field(default_factory=dict)
    _classes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _first: dict[ResidentAdapter, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for at, (adapter, _) in enumerate(self.units):
            self._first.setdefault(adapter, at)

    def first(self, adapter: ResidentAdapter) -> int:
        """The adapter's first unit; its experts follow one another. KeyError for one that has none here."""
        return self._first[adapter]

    def covers(self, adapters: Collection[ResidentAdapter]) -> bool:
        """Whether these adapters have their units here, and make up half of those that have."""
        return all(adapter in self._first for adapter in adapters) and len(self._first) <= 2 * len(adapters)

    def classes(self, layer: int) -> tuple[int, ...]:
        """Equal for layers in which every unit is laid out alike."""
        if layer not in self._classes:
            self._classes[layer] = tuple(adapter.layout.layout_of_layer[layer] for adapter in self._first)
        return self._classes[layer]

    def layer_table(self, layer: int, group: SiteGroup) -> UnitTable:
        """The units' rows at a group of a layer."""
        key = (group.sites, self.classes(layer))
        if key not in self._tables:
            rows = [adapter.layer_rows(layer, group, expert) for adapter, expert in self.units]
            self._tables[key] = UnitTable(group, rows, self.device)
        return self._tables[key]

    def model_table(self, group: SiteGroup) -> UnitTable:
        """The units' rows at a group of model sites; experts have none there."""
        key = (group.sites,)
        if key not in self._tables:
            rows = [adapter.model_rows(group) if expert is None else None for adapter, expert in self.units]
            self._tables[key] = UnitTable(group, rows, self.device)
        return self._tables[key]


@dataclass(eq=False, slots=True)
class EntryBatch:
    """Entries of one step that are known before it runs. Plans are shared by all layers that look alike.

    Args:
        units: that the entries name.
        entries: of the step.
    """

    units: UnitSet
    entries: Entries
    _plans: dict[tuple[object, ...], GroupPlan | None] = field(default_factory=dict)

    def layer_plan(self, layer: int, group: SiteGroup) -> GroupPlan | None:
        """The work at a group of a layer; None where there is none."""
        key = (group.sites, self.units.classes(layer))
        if key not in self._plans:
            self._plans[key] = self.units.layer_table(layer, group).plan(self.entries)
        return self._plans[key]

    def model_plan(self, group: SiteGroup) -> GroupPlan | None:
        """The work at a group of model sites."""
        key = (group.sites,)
        if key not in self._plans:
            self._plans[key] = self.units.model_table(group).plan(self.entries)
        return self._plans[key]

    def embedding_plan(self, group: SiteGroup, tokens: Int64Array) -> EmbeddingRows | None:
        """The work at the embedding, for the token of each row of the step."""
        return self.units.model_table(group).embedding(self.entries, tokens)


class AdapterBatch(EntryBatch):
    """The rows of one step that each have one adapter of weight 1.

    Args:
        segments: in row order, short segments first, standing together.
        device: where the index tensors go.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        units = UnitSet(tuple((segment.adapter, None) for segment in segments), device)
        super().__init__(units, _entries_of(segments))


def _entries_of(segments: Sequence[Segment]) -> Entries:
    lengths = np.array([segment.stop - segment.start for segment in segments], dtype=np.int64)
    starts = np.array([segment.start for segment in segments], dtype=np.int64)
    first = segments[0].start
    offsets = np.cumsum(lengths) - lengths
    rows = None
    if not np.array_equal(starts, first + offsets):
        rows = np.repeat(starts - offsets, lengths) + np.arange(lengths.sum())
    num_short = sum(segment.stop - segment.start for segment in segments if segment.is_short)
    return Entries(np.repeat(np.arange(len(segments)), lengths), num_short, rows, rows, first)


def sort_entries(
    units: Int64Array, rows: Int64Array, weights: npt.NDArray[np.float32], num_units: int
) -> tuple[Entries, Int64Array]:
    """Entries in any order, as ``Entries`` that read and add to ``rows``, and the order that they came to stand in."""
    counts = np.bincount(units, minlength=num_units)
    is_long = counts[units] > SHORT_UNIT_ENTRIES
    order = np.argsort(units + is_long * num_units, kind="stable")
    rows = rows[order]
    return Entries(units[order], int(len(units) - is_long.sum()), rows, rows, 0, weights[order]), order
