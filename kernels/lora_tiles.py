"""The low-rank work of a step as tiles, in arrays that kernels read: how many thread blocks there are, and what each
of them does.

Entries (see ``lora_work.py``) are sorted by unit and cut into tiles of at most ``block_rows`` entries of one unit. At a
group of sites a tile is as many blocks as it has rank rows to shrink to and output columns to expand to, so the blocks
of a launch are those of the work present: rows without an adapter have no tile, a unit without a site has no block
there, and a rank of 8 beside one of 128 has an eighth of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import CHUNK, Int64Array, SiteGroup

SHRINK_RANKS = 16
"""Rank rows of a block of shrink."""

EXPAND_COLUMNS = CHUNK
"""Output columns of a block of expand."""

SPLIT_CHUNKS = 4
"""Chunks of the input that shrink sums at a time. Fixed, as it decides the order of a row's sum."""

ROW_BLOCKS = (16, 64, 128)
"""Entries of a tile. They are the columns of a matrix product, so none of them changes the order of a row's sum."""

_ENOUGH_BLOCKS = 512
"""A launch of this many blocks fills a GPU without splitting the input."""


def split_count(in_features: int) -> int:
    """Partial sums of an input of this width."""
    return -(-in_features // (SPLIT_CHUNKS * CHUNK))


def choose_block_rows(longest: int) -> int:
    """The smallest tile that holds a unit's entries, so that its matrices are read once; at most 64 beyond 128.

    Above the largest tile the matrices are read again in any case, and smaller tiles make more blocks.
    """
    return next((rows for rows in ROW_BLOCKS if longest <= rows), ROW_BLOCKS[1])


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the entries of a step are, sorted by unit, on the device.

    Attributes:
        x_rows: [n] int32, the row of the input that each reads.
        y_rows: [n] int32, the row of the output that each adds to.
        slots: [n] int32, each one's place among the deltas, which lie row by row in the order given.
        weights: [n] float32.
    """

    x_rows: torch.Tensor
    y_rows: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowSums:
    """Which deltas add up to which row, on the device.

    Attributes:
        rows: [m] int32, distinct rows.
        starts: [m + 1] int32, each row's first slot.
        slot_units: [n] int32, the unit whose delta lies in a slot; -1 for none.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    slot_units: torch.Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """The blocks of the two launches at a group of sites.

    Attributes:
        shrink_starts, expand_starts: [tiles + 1] int32, the first block of each tile.
        low_starts: [tiles] int32, where each tile's low-rank rows begin, in elements of one partial sum.
        low_size: elements of one partial sum.
        shrink_blocks, expand_blocks: in all.
        parts: partial sums that shrink leaves to expand: one per split, or 1 where it adds them itself.
        has_gains: whether any unit has gains here.
    """

    shrink_starts: torch.Tensor
    expand_starts: torch.Tensor
    low_starts: torch.Tensor
    low_size: int
    shrink_blocks: int
    expand_blocks: int
    parts: int
    has_gains: bool


@dataclass(frozen=True, slots=True)
class DeviceTiles:
    """Entries that the device chose, and their tiles; attributes as of ``StepTiles``."""

    rows: StepRows
    sums: RowSums
    block_rows: int
    tile_units: torch.Tensor
    tile_firsts: torch.Tensor
    tile_counts: torch.Tensor


class StepTiles:
    """The entries of one step and their tiles.

    Args:
        units: [n] unit of each entry (see ``AdapterTable``), in any order.
        y_rows: [n] row that each adds to. The entries of one row are added in the order given.
        x_rows: [n] row that each reads; those of ``y_rows`` by default.
        weights: [n]; 1 by default.
        block_rows: entries of a tile at most; by default as ``choose_block_rows`` says.
        device: of the kernels.

    Attributes:
        order: [n] the entries given, as they came to stand.
        rows: of the sorted entries.
        sums: how deltas add up; None where no row has two entries, which then add to the output at once.
        block_rows: entries of a tile at most.
        tile_units, tile_firsts, tile_counts: [tiles] int32 unit, first entry and number of entries of each tile;
            padded to a power of two with tiles of no entries.
    """

    def __init__(
        self,
        units: Int64Array,
        y_rows: Int64Array,
        device: torch.device,
        *,
        x_rows: Int64Array | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        block_rows: int | None = None,
    ) -> None:
        self._device = device
        self.order = np.argsort(units, kind="stable")
        by_row = np.argsort(y_rows, kind="stable")
        slots = np.empty_like(by_row)
        slots[by_row] = np.arange(len(by_row))
        source = y_rows if x_rows is None else x_rows
        factors = np.ones(len(units), dtype=np.float32) if weights is None else weights.astype(np.float32)
        self.rows = StepRows(
            self._send(source[self.order]),
            self._send(y_rows[self.order]),
            self._send(slots[self.order]),
            torch.from_numpy(factors[self.order]).to(device),
        )
        self.sums = self._row_sums(y_rows[by_row], units[by_row])
        self._cut(units[self.order], block_rows)

    @property
    def num_tiles(self) -> int:
        return len(self._units)

    def work(self, table: AdapterTable, layer: int | None, group: SiteGroup) -> Work:
        """The blocks at a group of a layer; ``layer`` None: of model sites."""
        first = table.first_site(group.sites, layer)
        ranks = table.ranks(self._units, layer, first, len(group.sites)).astype(np.int64)
        rank = ranks.sum(axis=1)
        columns = np.array([-(-width // EXPAND_COLUMNS) for width in group.out_features], dtype=np.int64)
        shrink = -(-rank // SHRINK_RANKS)
        splits = split_count(group.in_features)
        parts = 1 if shrink.sum() >= _ENOUGH_BLOCKS else splits
        expand = ((ranks > 0) * columns).sum(axis=1)
        low = rank * self._counts
        return Work(
            self._starts(shrink * parts),
            self._starts(expand),
            self._send(np.pad(np.cumsum(low) - low, (0, self._padding))),
            int(low.sum()),
            int(shrink.sum()) * parts,
            int(expand.sum()),
            parts,
            table.has_gains(self._units, layer, first, len(group.sites)),
        )

    def _cut(self, units: Int64Array, block_rows: int | None) -> None:
        edges = np.flatnonzero(np.diff(units, prepend=-1, append=-1))
        firsts, lengths = edges[:-1], np.diff(edges)
        self.block_rows = block_rows or choose_block_rows(int(lengths.max(initial=1)))
        tiles = -(-lengths // self.block_rows)
        owner = np.repeat(np.arange(len(tiles)), tiles)
        within = (np.arange(len(owner)) - (np.cumsum(tiles) - tiles)[owner]) * self.block_rows
        self._units = units[firsts[owner]]
        self._counts = np.minimum(lengths[owner] - within, self.block_rows)
        self._padding = (1 << max(len(owner) - 1, 1).bit_length()) - len(owner)
        self.tile_units = self._send(np.pad(self._units, (0, self._padding)))
        self.tile_firsts = self._send(np.pad(firsts[owner] + within, (0, self._padding)))
        self.tile_counts = self._send(np.pad(self._counts, (0, self._padding)))

    def _row_sums(self, rows: Int64Array, units: Int64Array) -> RowSums | None:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        if len(starts) == len(rows):
            return None
        return RowSums(self._send(rows[starts]), self._send(np.append(starts, len(rows))), self._send(units))

    def _starts(self, blocks: Int64Array) -> torch.Tensor:
        ends = np.pad(np.cumsum(blocks), (1, self._padding), mode="edge" if len(blocks) else "constant")
        ends[0] = 0
        return self._send(ends)

    def _send(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self._device, non_blocking=True)
