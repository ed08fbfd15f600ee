"""Shapes of steps: how much a step may hold, to what its arrays are padded, and which arrays there are.

Steps are padded to one of few shapes, so that captured graphs serve them; those that no graph serves have just what
they need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from loraplex.kernels import lora_tiles, routed_lists
from loraplex.kernels.lora_tiles import EntryLists
from loraplex.kernels.paged_decode import MAX_SPLITS, SPLIT_KEYS
from loraplex.kernels.routed_lists import RoutedLists
from loraplex.kernels.step_buffers import Field
from loraplex.kernels.triton_runtime import power_of_two
from loraplex.server.device_batch import DeviceBatch

Array = npt.NDArray[Any]

NO_TABLE = -1
"""Stands for the generation of a table where a step does not depend on it."""

_BUCKET_STEPS = ((64, 8), (128, 16), (256, 32), (512, 64), (1024, 128))
"""Up to so many rows, buckets are so many rows apart."""

_SPARE_TILES = 256
"""Tiles of a bucket beside those that are full: of adapters with few rows among prompts."""

_FLOATS = ("weights", "top_p", "temperature")


@dataclass(frozen=True, slots=True)
class EntryCapacity:
    """Of lists of entries: entries, tiles (a power of two), rows that are sums (0: no row has two entries)."""

    entries: int
    tiles: int
    sums: int
    block_rows: int


@dataclass(frozen=True, slots=True)
class RoutedCapacity:
    """Of lists of routed entries: entries, tiles, slots of an entry, experts of a router; the linears that are routed,
    and whether any expert has gains."""

    entries: int
    tiles: int
    most: int
    max_experts: int
    block_rows: int
    sites: frozenset[str]
    gains: bool


@dataclass(frozen=True, slots=True)
class Capacities:
    """What a step may hold, and all else that its launches depend on.

    Attributes:
        rows, decodes: of the step; a step without prompts has as many of one as of the other.
        decode_tiles: by window.
        prompts, prefill_tiles: of chunks of prompts.
        logits: rows whose logits are wanted; None: all rows, in order.
        entries, linear, ffn: the adapters' work on the rows.
        logit_entries: on the logit rows.
        model_sites: the model sites that any adapter in the pool has.
        generation: of the adapter table; ``NO_TABLE`` where there is no work for adapters.
    """

    rows: int
    decodes: int
    decode_tiles: tuple[tuple[int | None, int], ...]
    prompts: int = 0
    prefill_tiles: int = 0
    logits: int | None = None
    entries: EntryCapacity | None = None
    linear: RoutedCapacity | None = None
    ffn: RoutedCapacity | None = None
    logit_entries: EntryCapacity | None = None
    model_sites: frozenset[str] = frozenset()
    generation: int = NO_TABLE


@dataclass(frozen=True, slots=True)
class ShapeLimits:
    """What the shapes of all steps follow from.

    Attributes:
        pool_tokens: whose keys fit the pool: so many are split among tiles, unless sequences share pages.
        max_sequences: of a step.
        prompt_tile: new tokens of a tile of attention, ``paged_prefill.tile_queries``.
        windows: the distinct attention windows of the model's layers.
    """

    pool_tokens: int
    max_sequences: int
    prompt_tile: int
    windows: tuple[int | None, ...]


def bucket(count: int) -> int:
    """The capacity that ``count`` rows are padded to: few different ones, of many rows at most a fourth more."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    step = next((step for stop, step in _BUCKET_STEPS if count <= stop), 256)
    return -(-count // step) * step


def exact_capacities(batch: DeviceBatch, model_sites: frozenset[str], generation: int) -> Capacities:
    """Just what a step needs."""
    arrays = batch.arrays
    prompts = len(batch.chunks) - batch.num_decodes
    capacities = Capacities(
        rows=batch.num_rows,
        decodes=batch.num_decodes,
        decode_tiles=tuple(_count_tiles(arrays).items()),
        prompts=prompts,
        prefill_tiles=len(arrays["prefill_tiles"]) if prompts else 0,
        logits=None if batch.logit_entries is None else len(arrays["logit_rows"]),
        entries=_entries(batch.entries.lists, None),
        linear=_routed(batch.entries.linear, None),
        ffn=_routed(batch.entries.ffn, None),
        logit_entries=None if batch.logit_entries is None else _entries(batch.logit_entries.lists, None),
    )
    return _with_table(capacities, model_sites, generation)


def bucket_capacities(
    batch: DeviceBatch, limits: ShapeLimits, model_sites: frozenset[str], generation: int
) -> Capacities:
    """What the bucket of a step needs, whatever the lengths and the mix of its rows."""
    rows, tiles = bucket(batch.num_rows), _count_tiles(batch.arrays)
    if batch.logit_entries is None:
        capacities = decode_bucket(rows, limits, tiles)
    else:
        capacities = prompt_bucket(rows, limits, tiles)
        if model_sites:
            capacities = replace(capacities, logit_entries=_entries(batch.logit_entries.lists, capacities.logits))
    entries = batch.entries
    capacities = replace(
        capacities,
        entries=_entries(entries.lists, rows),
        linear=_routed(entries.linear, rows),
        ffn=_routed(entries.ffn, rows),
    )
    return _with_table(capacities, model_sites, generation)


def decode_bucket(rows: int, limits: ShapeLimits, tiles: Mapping[int | None, int]) -> Capacities:
    """A bucket of rows that decode and have no adapters; ``tiles`` are needed of each window."""
    usual = 2 * rows + limits.pool_tokens // SPLIT_KEYS
    return Capacities(
        rows=rows,
        decodes=rows,
        decode_tiles=tuple(
            # Sequences that begin alike share pages, and may have more keys between them than the pool.
            (window, min(rows * MAX_SPLITS, max(usual, power_of_two(max(1, tiles.get(window, 0))))))
            for window in limits.windows
        ),
    )


def prompt_bucket(rows: int, limits: ShapeLimits, tiles: Mapping[int | None, int]) -> Capacities:
    """A bucket of rows of which any may decode, the others being chunks of prompts, without adapters."""
    # A chunk has two rows at least; one more prompt has none, for the tiles that are left over.
    prompts = min(rows // 2, limits.max_sequences) + 1
    return replace(
        decode_bucket(min(rows, limits.max_sequences), limits, tiles),
        rows=rows,
        prompts=prompts,
        prefill_tiles=-(-rows // limits.prompt_tile) + prompts,
        logits=min(rows, limits.max_sequences),
    )


def usual_buckets(max_rows: int, limits: ShapeLimits, generation: int) -> Iterator[Capacities]:
    """What decoding mostly needs: every bucket of rows, without adapters and with one adapter a row."""
    for rows in sorted({bucket(count) for count in range(1, max_rows + 1)}):
        plain = decode_bucket(rows, limits, {})
        yield plain
        entries = EntryCapacity(rows, power_of_two(rows), 0, lora_tiles.ROW_BLOCKS[0])
        yield _with_table(replace(plain, entries=entries), frozenset(), generation)


def _with_table(capacities: Capacities, model_sites: frozenset[str], generation: int) -> Capacities:
    has = capacities
    if has.entries is None and has.linear is None and has.ffn is None and has.logit_entries is None:
        return has
    return replace(has, model_sites=model_sites, generation=generation)


def _count_tiles(arrays: Mapping[str, Array]) -> dict[int | None, int]:
    found = {name.removeprefix("tiles_"): len(array) for name, array in arrays.items() if name.startswith("tiles_")}
    return {None if name == "None" else int(name): count for name, count in found.items()}


def _entries(lists: EntryLists | None, rows: int | None) -> EntryCapacity | None:
    """Exact, or for any entries of so many rows: one each, or a power of two in all where some row has two."""
    if lists is None:
        return None
    count, tiles, sums = len(lists.order), len(lists.tile_units), 0 if lists.sum_rows is None else len(lists.sum_rows)
    if rows is not None:
        count = max(power_of_two(count), rows) if sums else rows
        tiles = max(min(count, count // lists.block_rows + _SPARE_TILES), tiles)
        sums = rows if sums else 0
    return EntryCapacity(count, power_of_two(tiles), sums, lists.block_rows)


def _routed(lists: RoutedLists | None, rows: int | None) -> RoutedCapacity | None:
    if lists is None:
        return None
    count, tiles = len(lists.units), len(lists.tile_units)
    if rows is not None:
        count = max(power_of_two(count), rows) if count > rows else rows
        tiles = count
    adapters = [part.adapter for part in lists.parts]
    sites, gains = routed_lists.routed_sites(adapters), routed_lists.have_gains(adapters)
    return RoutedCapacity(count, tiles, lists.most, lists.max_experts, lists.block_rows, sites, gains)


def step_fields(capacities: Capacities) -> dict[str, Field]:
    """The arrays of a step that change with every step, by name."""
    found = {name: Field((capacities.rows,)) for name in ("tokens", "positions")}
    found |= {name: Field((capacities.rows,), padding=-1) for name in ("sources", "slots")}
    found["lengths"] = Field((capacities.decodes,))
    for window, tiles in capacities.decode_tiles:
        found[f"tiles_{window}"] = Field((tiles, 2))
        found[f"tile_starts_{window}"] = Field((capacities.decodes + 1,), padding=None)
    if capacities.prompts:
        found["row_starts"] = Field((capacities.prompts + 1,), padding=None)
        found["prompt_lengths"] = Field((capacities.prompts,))
        found["prefill_tiles"] = Field((capacities.prefill_tiles, 2), padding=(capacities.prompts - 1, 0))
    if capacities.logits is not None:
        found["logit_rows"] = Field((capacities.logits,))
    return found


def work_fields(capacities: Capacities) -> dict[str, Field]:
    """The arrays of the adapters' work, which stay as long as rows keep their adapters, by name."""
    found = _entry_fields("entries", capacities.entries)
    found |= _entry_fields("logit_entries", capacities.logit_entries)
    found |= _routed_fields("linear", capacities.linear)
    found |= _routed_fields("ffn", capacities.ffn)
    return found


def _entry_fields(prefix: str, capacity: EntryCapacity | None) -> dict[str, Field]:
    if capacity is None:
        return {}
    sizes = dict.fromkeys(("tile_units", "tile_firsts", "tile_counts"), capacity.tiles)
    sizes |= {"sum_rows": capacity.sums, "sum_starts": capacity.sums + 1}
    names = ["x_rows", "y_rows", "slots", "weights", "tile_units", "tile_firsts", "tile_counts"]
    names += ["sum_rows", "sum_starts", "slot_units"] if capacity.sums else []
    padding: dict[str, int | None] = {**lora_tiles.PADDING, "sum_starts": None}
    return {
        f"{prefix}.{name}": Field((sizes.get(name, capacity.entries),), name in _FLOATS, padding[name])
        for name in names
    }


def _routed_fields(prefix: str, capacity: RoutedCapacity | None) -> dict[str, Field]:
    if capacity is None:
        return {}
    sizes = dict.fromkeys(("tile_units", "tile_firsts", "tile_counts"), capacity.tiles)
    sizes["slot_starts"] = capacity.entries + 1
    return {
        f"{prefix}.{name}": Field((sizes.get(name, capacity.entries),), name in _FLOATS, padding)
        for name, padding in routed_lists.PADDING.items()
    }


def work_arrays(batch: DeviceBatch) -> dict[str, Array]:
    """The arrays of a batch under the names of ``work_fields``."""
    entries, logit_entries = batch.entries, batch.logit_entries
    named = {
        "entries": entries.lists,
        "logit_entries": None if logit_entries is None else logit_entries.lists,
        "linear": entries.linear,
        "ffn": entries.ffn,
    }
    return {
        f"{prefix}.{name}": array
        for prefix, lists in named.items()
        if lists is not None
        for name, array in lists.arrays().items()
    }
