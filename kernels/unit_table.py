"""Turns entries into index arrays without a loop over them: the rows of every unit of a batch, one after another.

A *unit* is an adapter, or one expert of an adapter. Its rows are found once; a list of entries, each naming its unit,
then becomes the indices of a gather by a few array operations, whatever the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.device_arrays import to_device
from loraplex.kernels.lora_rows import CHUNK, GroupRows, Int64Array, SiteGroup
from loraplex.kernels.lora_work import (
    EmbeddingRows,
    ExpandRows,
    GainRows,
    GatheredRows,
    GroupPlan,
    RowMap,
    RowSums,
    SegmentRows,
)


@dataclass(frozen=True, slots=True)
class Entries:
    """Which unit is applied to which row, ordered so that entries of one unit stand together, units with few first.

    Attributes:
        units: [n] index of each entry's unit.
        num_short: the leading entries, whose units have few of them; they are gathered together.
        x_rows: [n] the row that each reads; None if entry ``i`` reads row ``first + i``.
        y_rows: [n] the row that each adds to; None likewise.
        first: see above.
        weights: [n] float32; None where all are 1.
    """

    units: Int64Array
    num_short: int
    x_rows: Int64Array | None = None
    y_rows: Int64Array | None = None
    first: int = 0
    weights: npt.NDArray[np.float32] | None = None

    def same_as(self, other: Entries) -> bool:
        """Whether two lists of entries are equal."""
        mine = (self.units, self.x_rows, self.y_rows, self.weights)
        theirs = (other.units, other.x_rows, other.y_rows, other.weights)
        return (self.num_short, self.first) == (other.num_short, other.first) and all(
            np.array_equal(a, b) if a is not None and b is not None else a is b for a, b in zip(mine, theirs)
        )

    def long_segments(self) -> Iterator[tuple[int, int, int]]:
        """(unit, start, stop) of the runs of entries behind the short ones."""
        units = self.units[self.num_short :]
        if not len(units):
            return
        edges = self.num_short + np.concatenate(([0], np.flatnonzero(np.diff(units)) + 1, [len(units)]))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
            yield int(self.units[start]), start, stop


class Ragged:
    """Arrays of different lengths end to end, and selections of them as one."""

    def __init__(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        self.counts = np.array([len(array) for array in arrays], dtype=np.int64)
        self._starts = np.cumsum(self.counts) - self.counts

    def places(self, chosen: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Places of the elements of the chosen arrays, and for each element which of the chosen it belongs to."""
        counts = self.counts[chosen]
        owner = np.repeat(np.arange(len(chosen)), counts)
        ends = np.cumsum(counts)
        return np.arange(len(owner)) + (self._starts[chosen] - ends + counts)[owner], owner


class UnitTable:
    """The rows of units at one group of sites.

    Args:
        group: the sites.
        rows: of each unit; None for one that has nothing here.
        device: where index tensors go.
    """

    def __init__(self, group: SiteGroup, rows: Sequence[GroupRows | None], device: torch.device) -> None:
        self.group = group
        self._rows = rows
        self._device = device
        self._put = partial(to_device, device=device)
        present = [one for one in rows if one is not None]
        self.is_empty = not present
        if self.is_empty:
            return
        none = np.empty(0, dtype=np.int64)
        self._low_rank = Ragged([none if one is None else one.a_ids for one in rows])
        self._a_ids = np.concatenate([one.a_ids for one in present])
        self._scales = np.concatenate([one.scales for one in present])
        self._expand = Ragged([none if one is None else one.expand_ids for one in rows])
        self._b_ids = np.concatenate([one.expand_ids for one in present])
        self._b_rows = np.concatenate([one.expand_rows for one in present])
        no_bags = np.zeros(sum(group.out_chunks), dtype=np.int64)
        self._bag_sizes = np.stack([no_bags if one is None else one.bag_sizes for one in rows])
        self._gains = Ragged([none if one is None else one.gain_ids for one in rows])
        self._gain_ids = np.concatenate([one.gain_ids for one in present])
        self._gain_chunks = np.concatenate([one.gain_chunks for one in present])

    def plan(self, entries: Entries) -> GroupPlan | None:
        """The work of these entries; None where there is none."""
        if self.is_empty:
            return None
        short = entries.units[: entries.num_short]
        gathered = self._gather(entries, short) if self._low_rank.counts[short].any() else None
        segments = tuple(
            self._segment(entries, rows, start, stop)
            for unit, start, stop in entries.long_segments()
            if (rows := self._rows[unit]) is not None
        )
        if gathered is None and not segments:
            return None
        sums = self._sums(entries) if segments and entries.y_rows is not None else None
        return GroupPlan(self.group, gathered, segments, sums, entries.num_short)

    def _sums(self, entries: Entries) -> RowSums:
        assert entries.y_rows is not None
        weights = None if entries.weights is None else entries.weights[entries.num_short :]
        return row_sums(entries.y_rows[entries.num_short :], weights, self._device)

    def embedding(self, entries: Entries, tokens: Int64Array) -> EmbeddingRows | None:
        """The work at the embedding: ``tokens [rows]`` are those of the whole step."""
        if self.is_empty or not self._low_rank.counts[entries.units].any():
            return None
        places, owner = self._low_rank.places(entries.units)
        rows = entries.first + np.arange(len(entries.units)) if entries.x_rows is None else entries.x_rows
        token = tokens[rows][owner]
        element_ids = self._a_ids[places, token // CHUNK] * CHUNK + token % CHUNK
        return EmbeddingRows(
            self.group,
            self._put(element_ids),
            self._output(entries, entries.units, places, owner),
            gains=self._gain_rows(entries.units),
            weights=None if entries.weights is None else self._put(entries.weights[:, None]),
        )

    def _gather(self, entries: Entries, units: Int64Array) -> GatheredRows:
        places, owner = self._low_rank.places(units)
        in_chunk = np.arange(self.group.in_chunks, dtype=np.int64)
        weights = None if entries.weights is None else entries.weights[: len(units), None]
        return GatheredRows(
            rows=self._row_map(entries.first, entries.x_rows, 0, len(units)),
            a_ids=self._put(self._a_ids[places]),
            x_ids=self._put(owner[:, None] * self.group.in_chunks + in_chunk),
            output=self._output(entries, units, places, owner),
            gains=self._gain_rows(units),
            weights=None if weights is None else self._put(weights),
        )

    def _output(self, entries: Entries, units: Int64Array, places: Int64Array, owner: Int64Array) -> ExpandRows:
        """``places`` and ``owner`` of the low-rank rows of the leading entries, whose units these are."""
        counts = self._low_rank.counts[units]
        expanded, expanded_owner = self._expand.places(units)
        sizes = self._bag_sizes[units].ravel()
        scales = self._scales[places]
        if entries.weights is not None:
            scales = scales * entries.weights[owner]
        return ExpandRows(
            to=self._row_map(entries.first, entries.y_rows, 0, len(units)),
            scales=self._put(scales),
            b_ids=self._put(self._b_ids[expanded]),
            b_rows=self._put(self._b_rows[expanded] + (np.cumsum(counts) - counts)[expanded_owner]),
            bag_starts=self._put(np.cumsum(sizes) - sizes),
        )

    def _gain_rows(self, units: Int64Array) -> GainRows | None:
        if not self._gains.counts[units].any():
            return None
        places, owner = self._gains.places(units)
        bags = self._gain_chunks[places] + owner * sum(self.group.out_chunks)
        return GainRows(self._put(self._gain_ids[places]), self._put(bags))

    def _segment(self, entries: Entries, rows: GroupRows, start: int, stop: int) -> SegmentRows:
        a_ids = b_ids = None
        if not rows.contiguous:
            a_ids = self._put(rows.a_ids.ravel())
            b_ids = tuple(self._put(part.b_ids.ravel()) for part in rows.parts)
        return SegmentRows(
            start,
            stop,
            self._row_map(entries.first, entries.x_rows, start, stop),
            self._row_map(entries.first, entries.y_rows, start, stop),
            rows,
            a_ids,
            b_ids,
            GainRows(self._put(rows.gain_ids), self._put(rows.gain_chunks)) if len(rows.gain_ids) else None,
            None if entries.weights is None else self._put(entries.weights[start:stop, None]),
        )

    def _row_map(self, first: int, rows: Int64Array | None, start: int, stop: int) -> RowMap:
        if rows is None:
            return RowMap(first + start, first + stop)
        return RowMap(start, stop, self._put(rows[start:stop]))


def row_sums(rows: Int64Array, weights: npt.NDArray[np.float32] | None, device: torch.device) -> RowSums:
    """How entries that add to ``rows [n]`` sum up by row."""
    order = np.argsort(rows, kind="stable")
    in_order = rows[order]
    starts = np.flatnonzero(np.diff(in_order, prepend=-1))
    return RowSums(
        to_device(in_order[starts], device),
        to_device(order, device),
        to_device(starts, device),
        None if weights is None else to_device(weights[order], device),
    )
