"""How thread blocks of the low-rank kernels are shaped: tables of data, which a tuner on the GPU at hand may extend.

Nothing here changes a result. What decides the order of a row's sum (chunks of a split, splits in turn, rank rows one
after another) is fixed in ``lora_tiles.py``. Shrink has at most 32 rank rows in a block and expand at least 128
columns, so that each of the two takes one kind of matrix instruction everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Key = tuple[int, int, int, int]
"""Bits of the dtype, bucket of the sum of ranks, bucket of the width, entries of a tile; 0 stands for any bucket."""

RANK_BUCKETS = (16, 32, 64, 128, 256)
WIDTH_BUCKETS = (1024, 4096, 8192, 16384)
"""Upper ends; what is above the last belongs to it."""


@dataclass(frozen=True, slots=True)
class ShrinkShape:
    """Rank rows of a block, entries and chunks that it multiplies at a time, warps, and stages of its loads."""

    ranks: int
    rows: int
    chunks: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class ExpandShape:
    """Output columns of a block, rank rows and entries that it multiplies at a time, warps, and stages of its loads."""

    columns: int
    ranks: int
    rows: int
    warps: int
    stages: int


SHRINK: Mapping[Key, ShrinkShape] = MappingProxyType(
    {
        (16, 0, 0, 16): ShrinkShape(16, 16, 1, 4, 9),
        (16, 0, 0, 64): ShrinkShape(16, 64, 1, 4, 5),
        (16, 0, 0, 256): ShrinkShape(16, 32, 2, 4, 5),
        (32, 0, 0, 16): ShrinkShape(16, 16, 1, 4, 2),
        (32, 0, 0, 64): ShrinkShape(16, 16, 1, 4, 2),
        (32, 0, 0, 256): ShrinkShape(16, 16, 1, 4, 2),
    }
)

EXPAND: Mapping[Key, ExpandShape] = MappingProxyType(
    {
        (16, 0, 0, 16): ExpandShape(256, 16, 16, 4, 2),
        (16, 0, 0, 64): ExpandShape(128, 16, 64, 8, 2),
        (16, 0, 0, 256): ExpandShape(128, 16, 32, 4, 2),
        (16, 128, 0, 16): ExpandShape(128, 32, 16, 4, 2),
        (16, 128, 0, 64): ExpandShape(128, 32, 64, 8, 2),
        (16, 128, 0, 256): ExpandShape(128, 32, 32, 4, 2),
        (16, 256, 0, 16): ExpandShape(128, 32, 16, 4, 2),
        (16, 256, 0, 64): ExpandShape(128, 32, 64, 8, 2),
        (16, 256, 0, 256): ExpandShape(128, 32, 32, 4, 2),
        (32, 0, 0, 16): ExpandShape(128, 16, 16, 4, 2),
        (32, 0, 0, 64): ExpandShape(128, 16, 16, 4, 2),
        (32, 0, 0, 256): ExpandShape(128, 16, 16, 4, 2),
    }
)


def key_of(bits: int, rank: int, width: int, block_rows: int) -> Key:
    """The key of a launch: its bits and tile as they are, rank and width by bucket."""
    return bits, _bucket(rank, RANK_BUCKETS), _bucket(width, WIDTH_BUCKETS), block_rows


def choose_shrink(bits: int, rank: int, width: int, block_rows: int) -> ShrinkShape:
    """The shape for a sum of ranks and a width of the input: of its bucket, else of any.

    Raises:
        KeyError: where tiles of ``block_rows`` entries have no shape.
    """
    return SHRINK[_nearest(SHRINK, key_of(bits, rank, width, block_rows))]


def choose_expand(bits: int, rank: int, width: int, block_rows: int) -> ExpandShape:
    """The same for a sum of ranks and the widest of the outputs."""
    return EXPAND[_nearest(EXPAND, key_of(bits, rank, width, block_rows))]


def _nearest(table: Mapping[Key, object], key: Key) -> Key:
    """The key itself, else that of any width, else that of any rank and width."""
    bits, rank, _, block_rows = key
    return next((near for near in (key, (bits, rank, 0, block_rows)) if near in table), (bits, 0, 0, block_rows))


def _bucket(value: int, ends: tuple[int, ...]) -> int:
    return next((end for end in ends if value <= end), ends[-1])
