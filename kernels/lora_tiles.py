"""The low-rank work of a step as entries and tiles: lists on the host, and the same in tensors of fixed capacity.

An *entry* is a row, a unit (see ``adapter_table.py``) and a weight. Entries are sorted by unit and cut into *tiles* of
at most ``block_rows`` entries of one unit. At a group of sites a tile is as many blocks as it has rank rows to shrink
to and output columns to expand to, so the blocks of a launch are those of the work present: rows without an adapter
have no tile, a unit without a site has no block there, and a rank of 8 beside one of 128 has an eighth of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.lora_rows import CHUNK, Int64Array

SPLIT_CHUNKS = 4
"""Chunks of the input that shrink sums at a time. Fixed, as it decides the order of a row's sum."""

ROW_BLOCKS = (16, 64, 256)
"""Entries of a tile. They are the columns of a matrix product, so none of them changes the order of a row's sum."""

PADDING: Mapping[str, int] = MappingProxyType(
    {
        "x_rows": 0,
        "y_rows": 0,
        "slots": 0,
        "weights": 0,
        "tile_units": 0,
        "tile_firsts": 0,
        "tile_counts": 0,
        "sum_rows": -1,
        "slot_units": -1,
    }
)
"""What stands behind the content of each array up to its capacity; ``sum_starts`` repeats its last value."""

Int32Array = npt.NDArray[np.int32]


def split_count(in_features: int) -> int:
    """Partial sums of an input of this width."""
    return -(-in_features // (SPLIT_CHUNKS * CHUNK))


def choose_block_rows(longest: int) -> int:
    """The smallest tile, or the largest, if it holds a unit's entries, so that its matrices are read once; else 64.

    Above the largest tile the matrices are read again in any case, and smaller tiles make more blocks.
    """
    small, medium, large = ROW_BLOCKS
    return small if longest <= small else large if longest <= large else medium


@dataclass(frozen=True, slots=True)
class EntryLists:
    """The entries of a step, sorted by unit, and their tiles; on the host and without padding.

    Attributes:
        order: [n] int64, the entries given, as they came to stand.
        x_rows: [n] int32, the row of the input that each reads.
        y_rows: [n] int32, the row of the output that each adds to.
        slots: [n] int32, each one's place in the order of rows; those of one row are in the order given.
        weights: [n] float32.
        tile_units, tile_firsts, tile_counts: [t] int32 unit, first entry and number of entries of each tile.
        block_rows: entries of a tile at most.
        sum_rows: [m] int32, distinct rows; None, with the two below, where no row has two entries.
        sum_starts: [m + 1] int32, each row's first slot.
        slot_units: [n] int32, the unit of each slot.
    """

    order: Int64Array
    x_rows: Int32Array
    y_rows: Int32Array
    slots: Int32Array
    weights: npt.NDArray[np.float32]
    tile_units: Int32Array
    tile_firsts: Int32Array
    tile_counts: Int32Array
    block_rows: int
    sum_rows: Int32Array | None = None
    sum_starts: Int32Array | None = None
    slot_units: Int32Array | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What kernels read, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("order", "block_rows")}
        return {name: array for name, array in named.items() if array is not None}


def list_entries(
    units: Int64Array,
    y_rows: Int64Array,
    *,
    x_rows: Int64Array | None = None,
    weights: npt.NDArray[np.float32] | None = None,
    block_rows: int | None = None,
) -> EntryLists:
    """Sort entries by unit and cut them into tiles.

    Args:
        units: [n] unit of each entry, in any order.
        y_rows: [n] row that each adds to. The entries of one row are added in the order given.
        x_rows: [n] row that each reads; those of ``y_rows`` by default.
        weights: [n]; 1 by default.
        block_rows: entries of a tile at most; by default as ``choose_block_rows`` says.
    """
    order = np.argsort(units, kind="stable")
    rows = y_rows[order].astype(np.int32)
    slots, sums = _slots(units, y_rows, order)
    return EntryLists(
        order,
        rows if x_rows is None else x_rows[order].astype(np.int32),
        rows,
        slots,
        np.ones(len(units), dtype=np.float32) if weights is None else weights[order].astype(np.float32),
        *_cut(units[order], block_rows),
        *sums,
    )


def _slots(
    units: Int64Array, y_rows: Int64Array, order: Int64Array
) -> tuple[Int32Array, tuple[Int32Array | None, ...]]:
    """Slots of the entries in ``order``; and rows, first slots and units, where a row has two entries."""
    if (y_rows[1:] > y_rows[:-1]).all():
        return order.astype(np.int32), (None, None, None)
    by_row = np.argsort(y_rows, kind="stable")
    slots = np.empty(len(units), dtype=np.int32)
    slots[by_row] = np.arange(len(units), dtype=np.int32)
    sorted_rows = y_rows[by_row]
    starts = _run_starts(sorted_rows)
    if len(starts) == len(units):
        return slots[order], (None, None, None)
    ends = np.append(starts, len(units)).astype(np.int32)
    return slots[order], (sorted_rows[starts].astype(np.int32), ends, units[by_row].astype(np.int32))


def _cut(units: Int64Array, block_rows: int | None) -> tuple[Int32Array, Int32Array, Int32Array, int]:
    """Units, first entries and lengths of the tiles of sorted entries, and entries of a tile at most."""
    firsts = _run_starts(units)
    lengths = np.empty_like(firsts)
    np.subtract(firsts[1:], firsts[:-1], out=lengths[:-1])
    lengths[-1:] = len(units) - firsts[-1:]
    longest = int(lengths.max(initial=1))
    size = block_rows or choose_block_rows(longest)
    if longest > size:
        tiles = -(-lengths // size)
        within = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * size
        lengths = np.minimum(np.repeat(lengths, tiles) - within, size)
        firsts = np.repeat(firsts, tiles) + within
    return units[firsts].astype(np.int32), firsts.astype(np.int32), lengths.astype(np.int32), size


def _run_starts(values: Int64Array) -> Int64Array:
    """Where each run of equal values begins."""
    begins = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins.nonzero()[0]


@dataclass(frozen=True, slots=True)
class RowSums:
    """Which slots add up to which row, on the device.

    Attributes:
        rows: [M] int32, distinct rows; -1 for none.
        starts: [M + 1] int32, each row's first slot.
        slot_units: [E] int32, the unit whose work lies in a slot; -1 for none.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    slot_units: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceEntries:
    """Entries and tiles on the device, in int32 (weights in float32), padded to capacities as ``PADDING`` says.

    A tile of no entries has no blocks, so what stands in place of missing entries is never read. Tiles of no entries
    may stand between others.

    Attributes:
        x_rows, y_rows, slots, weights: [E], as of ``EntryLists``.
        tile_units, tile_firsts, tile_counts: [T], where T is a power of two.
        block_rows: entries of a tile at most.
        sums: how slots add up; None where no row has two entries, which then add to the output at once.
    """

    x_rows: torch.Tensor
    y_rows: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    tile_units: torch.Tensor
    tile_firsts: torch.Tensor
    tile_counts: torch.Tensor
    block_rows: int
    sums: RowSums | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, torch.Tensor], block_rows: int) -> DeviceEntries:
        """From tensors by the names of ``EntryLists.arrays``; rows are summed where "sum_rows" is among them."""
        tiles = len(arrays["tile_units"])
        if tiles & (tiles - 1) or not tiles:
            raise ValueError(f"tile_units: {tiles} is not a power of two")
        sums = None
        if "sum_rows" in arrays:
            sums = RowSums(arrays["sum_rows"], arrays["sum_starts"], arrays["slot_units"])
        return cls(
            arrays["x_rows"],
            arrays["y_rows"],
            arrays["slots"],
            arrays["weights"],
            arrays["tile_units"],
            arrays["tile_firsts"],
            arrays["tile_counts"],
            block_rows,
            sums,
        )

    @classmethod
    def copy_of(
        cls,
        lists: EntryLists,
        device: torch.device,
        *,
        entries: int | None = None,
        tiles: int | None = None,
        rows: int | None = None,
    ) -> DeviceEntries:
        """A step's lists alone, in tensors of their own, at capacities that are just large enough by default."""
        arrays = lists.arrays()
        num_tiles = tiles or 1 << max(len(lists.tile_units) - 1, 0).bit_length()
        num_entries = len(lists.order) if entries is None else entries
        num_rows = rows or (0 if lists.sum_rows is None else len(lists.sum_rows))
        sizes = {"sum_rows": num_rows, "sum_starts": num_rows + 1}
        sizes |= {name: num_tiles for name in arrays if name.startswith("tile_")}
        found = {
            name: torch.from_numpy(pad_entries(name, array, sizes.get(name, num_entries))).to(device)
            for name, array in arrays.items()
        }
        return cls.of(found, lists.block_rows)


def pad_entries(name: str, array: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    """An array of ``EntryLists`` followed by its padding.

    Raises:
        ValueError: where it is longer than its capacity.
    """
    if len(array) > capacity:
        raise ValueError(f"{name}: {len(array)} do not fit in {capacity}")
    filler = array[-1] if name == "sum_starts" else PADDING[name]
    padded = np.full(capacity, filler, dtype=array.dtype)
    padded[: len(array)] = array
    return padded
