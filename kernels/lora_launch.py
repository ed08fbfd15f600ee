"""The low-rank work of a step at one group of sites, by kernels that read all that varies from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_grid import GroupLaunch, count_by_column, resident_programs
from loraplex.kernels.lora_operators import Tensors
from loraplex.kernels.lora_rows import Int64Array, SiteGroup
from loraplex.kernels.lora_tiles import DeviceEntries, EntryLists

__all__ = ["StepWork", "Tensors", "add_embedding", "add_entries"]


@dataclass(frozen=True, slots=True)
class StepWork:
    """Which blocks of the launches belong to which tile, counted on the device once a step.

    Attributes:
        starts: [columns, groups, 2, pitch] int32: the first block of each of the T tiles, and behind them the number of
            blocks, of shrink (rank rows alone; each has ``parts`` blocks) and of expand. ``pitch`` is T + 1 or a little
            more. A column is a layer, the last one of a table is that of model sites.
        first_column: what the first of ``starts`` is.
        places: by sites, which of ``starts`` a group is, and how it is launched.
        blocks: by sites, blocks of rank rows (of one part) and of columns in each column, where launches are made for
            the entries of one step alone; empty where they are made for any.
    """

    starts: torch.Tensor
    first_column: int
    places: Mapping[tuple[str, ...], tuple[int, GroupLaunch]]
    blocks: Mapping[tuple[str, ...], tuple[Int64Array, Int64Array]] = field(default_factory=dict)

    def is_idle(self, group: SiteGroup) -> bool:
        """Whether no adapter has any of a group's sites."""
        return self.places[group.sites][1].idle

    @classmethod
    def of(
        cls, entries: DeviceEntries, table: AdapterTable, dtype: torch.dtype, *, lists: EntryLists | None = None
    ) -> StepWork:
        """For all groups of all layers and of the model, in one launch.

        Args:
            dtype: of the arena.
            lists: the entries, where the launches are for them alone and none is to have idle blocks.
        """
        places = {
            group.sites: (index, _launch_at(entries, table, dtype, layer, group))
            for layer, groups in ((0, table.layer_groups), (None, table.model_groups))
            for index, group in enumerate(groups)
        }
        facts = [places[group.sites][1].facts for group in (*table.layer_groups, *table.model_groups)]
        starts = _count(entries, table, facts, len(table.layer_groups), 0, table.num_layers + 1)
        if lists is None:
            return cls(starts, 0, places)
        blocks = {sites: count_by_column(lists, table, launch) for sites, (_, launch) in places.items()}
        return cls(starts, 0, places, blocks)

    @classmethod
    def at(
        cls, entries: DeviceEntries, table: AdapterTable, dtype: torch.dtype, layer: int | None, group: SiteGroup
    ) -> StepWork:
        """For one group, or consecutive sites of one, of a layer; ``layer`` None: of model sites."""
        launch = _launch_at(entries, table, dtype, layer, group)
        column = table.num_layers if layer is None else layer
        starts = _count(entries, table, [launch.facts], 0 if layer is None else 1, column, 1)
        return cls(starts, column, {group.sites: (0, launch)})


def _launch_at(
    entries: DeviceEntries, table: AdapterTable, dtype: torch.dtype, layer: int | None, group: SiteGroup
) -> GroupLaunch:
    bits, capacity = dtype.itemsize * 8, len(entries.slots)
    return GroupLaunch.at(table, layer, group, bits=bits, entries=capacity, block_rows=entries.block_rows)


def _count(
    entries: DeviceEntries,
    table: AdapterTable,
    facts: list[list[int]],
    layer_groups: int,
    first_column: int,
    columns: int,
) -> torch.Tensor:
    tiles = [entries.tile_units, entries.tile_counts]
    flat = [fact for group in facts for fact in group]
    starts: torch.Tensor = torch.ops.loraplex.count_work(
        tiles, table.record_of, table.records, flat, layer_groups, first_column, columns
    )
    return starts


def add_entries(
    y: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    entries: DeviceEntries,
    work: StepWork,
    layer: int | None,
    group: SiteGroup,
    *,
    bias: torch.Tensor | None = None,
    gain_base: torch.Tensor | None = None,
) -> None:
    """Add the low-rank work of a step at a group of sites in place, as ``lora.add_lora`` does.

    Args:
        y: [rows, sum of the group's out_features], the base products; rows without an entry are not touched.
        x: [rows, in_features], the group's input, same dtype.
        chunks: [num_chunks, 128], the arena (of one layer for layer sites, whole for model sites), same dtype.
        table: of the adapters.
        entries: of the step.
        work: of ``entries``.
        layer: of the group; None for model sites.
        bias: [sum of out_features] that is in ``y`` and that gains leave alone.
        gain_base: [E, sum of out_features], by slot: the base products that gains multiply, bias included; the rows of
            ``y`` by default.
    """
    low = shrink_entries(x, chunks, table, entries, work, layer, group)
    if low is not None:
        expand_entries(y, low, chunks, table, entries, work, layer, group, bias=bias, gain_base=gain_base)


def add_embedding(
    x: torch.Tensor,
    tokens: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    entries: DeviceEntries,
    work: StepWork,
    group: SiteGroup,
) -> None:
    """Add ``weight * scale * B^T A[:, token]`` in place to embedded tokens.

    Args:
        x: [rows, hidden], the base's embeddings; rows without an entry are not touched.
        tokens: [rows] int32; an entry's is that of its row of the input.
        chunks: [num_chunks, 128], the whole arena, same dtype as ``x``.
        group: the embedding alone, whose input is as wide as the vocabulary.
    """
    low = _shrink(tokens, chunks, table, entries, work, None, group, 1, lookup=True)
    if low is not None:
        expand_entries(x, low, chunks, table, entries, work, None, group)


def shrink_entries(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    entries: DeviceEntries,
    work: StepWork,
    layer: int | None,
    group: SiteGroup,
) -> torch.Tensor | None:
    """The first half of ``add_entries``, which needs no base product: ``A x`` of each entry.

    Returns:
        What ``expand_entries`` takes, [parts, E, R] float32; None where there is nothing to launch.
    """
    _, launch = work.places[group.sites]
    low = _shrink(x, chunks, table, entries, work, layer, group, launch.parts, lookup=False)
    if low is None or not launch.sums_first:
        return low
    summed: torch.Tensor = torch.ops.loraplex.sum_partial(low)
    return summed


def expand_entries(
    y: torch.Tensor,
    low: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    entries: DeviceEntries,
    work: StepWork,
    layer: int | None,
    group: SiteGroup,
    *,
    bias: torch.Tensor | None = None,
    gain_base: torch.Tensor | None = None,
) -> None:
    """The second half of ``add_entries``: add ``B`` times ``low``, of ``shrink_entries``, to ``y``."""
    index, launch = work.places[group.sites]
    column = table.num_layers if layer is None else layer
    _, blocks = _blocks(entries, work, column, launch)
    if not blocks:
        return
    expand, sums = launch.expand, entries.sums
    sizes = [launch.first_site, group.in_features, *group.out_features]
    to = y if sums is None else y.new_empty((len(entries.slots), y.shape[1]), dtype=torch.float32)
    # An operator may not alias what it changes, so no base stands for the output itself.
    base = y if gain_base is None and sums is not None else gain_base
    torch.ops.loraplex.paged_expand(
        to,
        base,
        bias,
        low,
        chunks,
        table.tensors,
        [entries.y_rows, entries.slots, entries.weights],
        [entries.tile_units, entries.tile_firsts, entries.tile_counts, work.starts],
        _starts_at(work, column, index) + work.starts.shape[3],
        [column, table.page_chunks],
        sizes,
        [expand.columns, expand.ranks, expand.rows, expand.warps, expand.stages],
        min(blocks, resident_programs(y.device, expand.warps)),
        sums is not None,
        gain_base is not None,
        table.has_gains,
    )
    if sums is not None:
        torch.ops.loraplex.sum_deltas(y, to, [sums.rows, sums.starts, sums.slot_units], table.tensors, column, sizes)


def _shrink(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    entries: DeviceEntries,
    work: StepWork,
    layer: int | None,
    group: SiteGroup,
    parts: int,
    *,
    lookup: bool,
) -> torch.Tensor | None:
    index, launch = work.places[group.sites]
    column = table.num_layers if layer is None else layer
    blocks, _ = _blocks(entries, work, column, launch)
    if not blocks:
        return None
    shrink = launch.shrink
    low: torch.Tensor = torch.ops.loraplex.paged_shrink(
        x,
        chunks,
        table.tensors,
        entries.x_rows,
        [entries.tile_units, entries.tile_firsts, entries.tile_counts, work.starts],
        _starts_at(work, column, index),
        [column, table.page_chunks],
        [launch.first_site, group.in_features, *group.out_features],
        [launch.rank, parts, shrink.ranks, shrink.rows, shrink.chunks, shrink.warps, shrink.stages],
        min(blocks * parts, resident_programs(x.device, shrink.warps)),
        lookup,
    )
    return low


def _starts_at(work: StepWork, column: int, index: int) -> int:
    """Where shrink's starts of a group begin, in elements; those of expand follow."""
    return ((column - work.first_column) * work.starts.shape[1] + index) * 2 * work.starts.shape[3]


def _blocks(entries: DeviceEntries, work: StepWork, column: int, launch: GroupLaunch) -> tuple[int, int]:
    """Blocks of rank rows (of one part) and of columns: those present where the host has counted them, else as many as
    could have work."""
    if launch.idle:
        return 0, 0
    counted = work.blocks.get(launch.group.sites)
    if counted is None:
        return launch.most_blocks(min(len(entries.tile_units), len(entries.slots)))
    shrink, expand = counted
    return int(shrink[column]), int(expand[column])
