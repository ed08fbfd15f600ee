"""Mixtures on the device: what ``mixture.py`` does, without a step that waits for the host.

Everything that varies from step to step lies in tensors of fixed capacity, and the shapes of all launches follow from
capacities and from what the table holds, so that a captured graph serves any choice of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.expert_launch import EXPERT_OPERATORS
from loraplex.kernels.lora_launch import StepWork, add_entries, shrink_entries
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.lora_tiles import DeviceEntries, RowSums
from loraplex.kernels.route_launch import ROUTE_OPERATORS, most_tiles
from loraplex.kernels.routed_lists import ACTIVATION_CODES, DeviceRouted, RoutedLists, list_routed

__all__ = [
    "DeviceChoice",
    "DeviceExperts",
    "DeviceRouted",
    "RoutedLists",
    "add_routed",
    "list_routed",
    "run_experts",
]


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What the routers of one site chose, in the order of ``RoutedLists.rows``.

    Attributes:
        experts: [R, most] int32, best first.
        weights: [R, most] float32, without those of a mix; 0 where an expert is not chosen.
    """

    experts: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The filled slots of one site: by slot, and sorted by unit and cut into tiles (see ``route_triton.py``)."""

    choice: DeviceChoice
    slot_units: torch.Tensor
    slot_weights: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    num_tiles: torch.Tensor

    def entries(self, routed: DeviceRouted, x_rows: torch.Tensor) -> DeviceEntries:
        """Weighted entries that add to the rows of the step."""
        sums = RowSums(routed.sum_rows, routed.slot_starts, self.slot_units)
        return DeviceEntries(x_rows, self.rows, self.slots, self.weights, *self.tiles, routed.block_rows, sums)


def add_routed(
    y: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    routed: DeviceRouted,
    layer: int,
    group: SiteGroup,
    bias: torch.Tensor | None = None,
) -> list[tuple[str, DeviceChoice]]:
    """Add ``sum_e w_e s B_e A_e x`` in place at each linear of a group that has a router of its own.

    Args:
        y: [rows, sum of the group's out_features].
        x: [rows, in_features], which the routers read too.
        chunks: [num_chunks, 128], the arena of the layer.
        bias: [sum of out_features] that is in ``y`` and that gains leave alone.

    Returns:
        What was chosen, by linear; at one that no adapter of the step routes in this layer, nothing was.
    """
    if routed.sites is not None and not routed.sites.intersection(group.sites):
        return []
    chosen = _choose(x, chunks, table, routed, layer, table.first_site(group.sites, layer), len(group.sites))
    choices: list[tuple[str, DeviceChoice]] = []
    at = 0
    for site, width, found in zip(group.sites, group.out_features, chosen):
        if routed.sites is None or site in routed.sites:
            alone = SiteGroup((site,), group.in_features, (width,))
            entries = found.entries(routed, found.rows)
            work = StepWork.at(entries, table, chunks.dtype, layer, alone)
            here = slice(at, at + width)
            add_entries(
                y[:, here], x, chunks, table, entries, work, layer, alone, bias=None if bias is None else bias[here]
            )
            choices.append((site, found.choice))
        at += width
    return choices


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """The inner activations of the chosen experts: ``hidden [slots, ffn]``, of the filled slots."""

    table: AdapterTable
    routed: DeviceRouted
    choice: DeviceChoice
    hidden: torch.Tensor
    found: _Sorted

    def combine(self, num_rows: int, others: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``sum_e w_e h_e`` of the routed rows; the other rows are those of ``others() [num_rows, ffn]``."""
        combined = others()
        assert len(combined) == num_rows
        EXPERT_OPERATORS.combine_experts(
            combined,
            self.hidden,
            self.found.slot_units,
            self.found.slot_weights,
            self.routed.sum_rows,
            self.routed.slot_starts,
        )
        return combined

    def add_down(
        self,
        y: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        down: Callable[[torch.Tensor], torch.Tensor],
        bias: torch.Tensor | None,
    ) -> None:
        """As in ``step_adapters.Experts``."""
        if bias is not None:
            EXPERT_OPERATORS.share_bias(y, bias, self.choice.weights, self.routed.sum_rows, self.routed.slot_starts)
        entries = self.found.entries(self.routed, self.found.slots)
        work = StepWork.at(entries, self.table, chunks.dtype, layer, group)
        gain_base = down(self.hidden) if _have_gains(self.table, self.routed) else None
        add_entries(y, self.hidden, chunks, self.table, entries, work, layer, group, bias=bias, gain_base=gain_base)


def run_experts(
    gate_up: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    routed: DeviceRouted,
    layer: int,
    group: SiteGroup,
    bias: torch.Tensor | None,
    activation: str,
) -> DeviceExperts:
    """Run the chosen experts up to their inner activations.

    Args:
        gate_up: [rows, 2 * ffn], the base products.
        x: [rows, hidden], what gate, up and the router read.
        chunks: [num_chunks, 128], the arena of the layer.
        group: gate_proj and up_proj.
        bias: [2 * ffn] that is in ``gate_up``, or None.
        activation: the base's, for experts without one of their own; a name of ``ACTIVATION_CODES``.
    """
    (found,) = _choose(x, chunks, table, routed, layer, table.num_sites, 1)
    entries = DeviceEntries(found.rows, found.slots, found.slots, found.weights, *found.tiles, routed.block_rows)
    work = StepWork.at(entries, table, chunks.dtype, layer, group)
    low = shrink_entries(x, chunks, table, entries, work, layer, group)
    if low is None:  # no expert has any of these sites
        low = x.new_zeros((1, len(entries.slots), table.group_rank(group.sites, layer)), dtype=torch.float32)
    hidden = EXPERT_OPERATORS.expert_hidden(
        gate_up,
        bias,
        low,
        chunks,
        table.tensors,
        [routed.activations, found.rows, found.slots],
        [*found.tiles, found.num_tiles],
        routed.most,
        routed.block_rows,
        layer,
        table.page_chunks,
        table.first_site(group.sites, layer),
        ACTIVATION_CODES[activation],
        _have_gains(table, routed),
    )
    return DeviceExperts(table, routed, found.choice, hidden, found)


def _have_gains(table: AdapterTable, routed: DeviceRouted) -> bool:
    return table.has_gains if routed.gains is None else routed.gains


def _choose(
    x: torch.Tensor,
    chunks: torch.Tensor,
    table: AdapterTable,
    routed: DeviceRouted,
    layer: int,
    first_router: int,
    num_routers: int,
) -> list[_Sorted]:
    """Let consecutive routers that read the same input choose, and sort what each chose."""
    experts, weights, slot_units, slot_weights = ROUTE_OPERATORS.route_on_device(
        x,
        chunks,
        [table.pages, table.first_page, table.record_of, table.routers],
        [routed.score_places, routed.tile_units, routed.tile_firsts, routed.tile_counts],
        [
            routed.rows,
            routed.units,
            routed.weights,
            routed.limits,
            routed.renormalize,
            routed.top_p,
            routed.temperature,
        ],
        routed.most,
        routed.max_experts,
        layer,
        first_router,
        num_routers,
        table.page_chunks,
    )
    rows, slots, by_place, units, firsts, counts, num_tiles = ROUTE_OPERATORS.sort_on_device(
        slot_units,
        slot_weights,
        routed.rows,
        routed.most,
        routed.block_rows,
        most_tiles(routed.num_slots, routed.block_rows, len(table.first_page)),
    )
    return [
        _Sorted(
            DeviceChoice(experts[i], weights[i]),
            slot_units[i],
            slot_weights[i],
            rows[i],
            slots[i],
            by_place[i],
            (units[i], firsts[i], counts[i]),
            num_tiles[i : i + 1],
        )
        for i in range(num_routers)
    ]
