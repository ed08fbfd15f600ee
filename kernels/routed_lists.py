"""The routed rows of a step as arrays: listed by the host in numpy, read by the device from buffers of fixed capacity.

A routed *entry* is a row under an adapter whose routers choose experts for it. Entries stand in the order of their
rows, those of one row in the order of its adapters' units. Each has ``most`` consecutive slots for the experts chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.kernels.lora_tiles import choose_block_rows, list_entries
from loraplex.kernels.router_plan import RoutedRows
from loraplex.kernels.triton_runtime import power_of_two

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

ROUTER_ROWS = 16
"""Rows that a block scores; in float32, more of them do not fit in registers."""

MIN_EXPERTS = 16
"""Experts that a block scores: the fewest rows that a product of matrices has."""

ACTIVATION_CODES = {"silu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "relu": 4}
"""Activations by name, as kernels are told of them; 0 is the base's."""

PADDING: Mapping[str, int | None] = {
    "units": -1,
    "rows": 0,
    "weights": 0,
    "limits": 0,
    "renormalize": 0,
    "top_p": 0,
    "temperature": 1,
    "activations": 0,
    "sum_rows": -1,
    "slot_starts": None,
    "score_places": 0,
    "tile_units": 0,
    "tile_firsts": 0,
    "tile_counts": 0,
}
"""What fills each array of ``RoutedLists.arrays`` up to its capacity; None repeats its last element. An entry of unit
-1 chooses nothing."""


@dataclass(frozen=True, slots=True)
class RoutedLists:
    """The routed entries of a step and the tiles in which routers score them; no padding.

    Attributes:
        parts: those given, by unit.
        places: of each part's rows among the entries, in the part's order.
        units: [n] int32, the unit of each entry's adapter itself; expert e's is ``1 + e`` behind it.
        rows: [n] int32 rows of the step, ascending.
        weights: [n] float32, the adapter's in a mix.
        limits, renormalize: [n] int32, how experts are chosen (see ``ops.route``).
        top_p, temperature: [n] float32 likewise.
        activations: [n] int32 codes of ``ACTIVATION_CODES``.
        sum_rows: [m] int32, distinct rows.
        sum_starts: [m + 1] int32, each one's first entry.
        score_places: [n] int32, the entries in the order of their units.
        tile_units, tile_firsts, tile_counts: [t] int32 unit, first of ``score_places`` and number of entries of each
            tile of at most ``ROUTER_ROWS`` entries of a unit.
        most: experts that an entry may choose at most, a power of two.
        max_experts: that a router has at most, a power of two.
        block_rows: of the tiles in which experts work.
    """

    parts: tuple[RoutedRows, ...]
    places: tuple[Int64Array, ...]
    units: Int32Array
    rows: Int32Array
    weights: Float32Array
    limits: Int32Array
    renormalize: Int32Array
    top_p: Float32Array
    temperature: Float32Array
    activations: Int32Array
    sum_rows: Int32Array
    sum_starts: Int32Array
    score_places: Int32Array
    tile_units: Int32Array
    tile_firsts: Int32Array
    tile_counts: Int32Array
    most: int
    max_experts: int
    block_rows: int

    def arrays(self, most: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """What the device reads, by the names of ``PADDING``.

        Args:
            most: slots of an entry, not below ``self.most``, which it is by default.
        """
        found = {name: getattr(self, name) for name in PADDING if name != "slot_starts"}
        return {**found, "slot_starts": self.sum_starts * np.int32(most or self.most)}


def list_routed(parts: Sequence[RoutedRows], table: AdapterTable) -> RoutedLists:
    """List the routed rows of a step.

    Args:
        parts: by adapter, at least one, in any order; a row may come under several adapters of a mix.
        table: that has all of them.
    """
    # A row's experts are summed in the order of its entries, which must not go by what stands beside it.
    parts = sorted(parts, key=lambda part: (table.unit_of(part.adapter), part.weight))
    routings = [part.routing for part in parts]
    lengths = np.array([len(part.rows) for part in parts])
    given = np.concatenate([part.rows for part in parts])
    by_part = np.array([table.unit_of(part.adapter) for part in parts])
    scored = list_entries(np.repeat(by_part, lengths), given, block_rows=ROUTER_ROWS)
    places = np.empty_like(scored.order)
    places[scored.order] = scored.slots
    owner = np.empty_like(places)
    owner[places] = np.repeat(np.arange(len(parts)), lengths)
    rows = np.empty(len(given), dtype=np.int32)
    rows[places] = given
    sum_rows, sum_starts = scored.sum_rows, scored.sum_starts
    if sum_rows is None or sum_starts is None:
        sum_rows, sum_starts = rows, np.arange(len(rows) + 1, dtype=np.int32)
    facts = np.array([_facts(part) for part in parts], dtype=np.float32).T[:, owner]
    limits, renormalize, activations = facts[:3].astype(np.int32)
    top_p, temperature, weights = facts[3:]
    return RoutedLists(
        parts=tuple(parts),
        places=tuple(np.split(places, np.cumsum(lengths)[:-1])),
        units=by_part[owner].astype(np.int32),
        rows=rows,
        weights=weights,
        limits=limits,
        renormalize=renormalize,
        top_p=top_p,
        temperature=temperature,
        activations=activations,
        sum_rows=sum_rows,
        sum_starts=sum_starts,
        score_places=scored.slots,
        tile_units=scored.tile_units,
        tile_firsts=scored.tile_firsts,
        tile_counts=scored.tile_counts,
        most=power_of_two(max(routing.limit for routing in routings)),
        max_experts=max(MIN_EXPERTS, power_of_two(max(routing.num_experts for routing in routings))),
        block_rows=choose_block_rows(int(lengths.max())),
    )


def _facts(part: RoutedRows) -> tuple[float, ...]:
    """Limit, renormalize, code of the activation, top_p, temperature and weight."""
    routing = part.routing
    return (
        routing.limit,
        routing.renormalize,
        0 if routing.activation is None else ACTIVATION_CODES[routing.activation],
        math.inf if routing.top_p is None else routing.top_p,
        routing.temperature if routing.temperature > 0 else 1.0,
        part.weight,
    )


def routed_sites(adapters: Iterable[ResidentAdapter]) -> frozenset[str]:
    """The linears that any router of these adapters routes."""
    return frozenset(site for adapter in adapters for mixture in adapter.layout.mixtures for site in mixture.routers)


def have_gains(adapters: Iterable[ResidentAdapter]) -> bool:
    """Whether any expert of these adapters has gains."""
    mixtures = (mixture for adapter in adapters for mixture in adapter.layout.mixtures)
    sites = (site for mixture in mixtures for expert in mixture.experts for site in expert.values())
    return any(site.gain_start is not None for site in sites)


@dataclass(frozen=True, slots=True)
class DeviceRouted:
    """``RoutedLists`` on the device, in tensors of fixed capacity; attributes as there.

    R entries, M distinct rows and T tiles have room, where R is as good for M and for T. The tensors may be views of
    one buffer; nothing of what lies in them is read when a step is launched.

    Attributes:
        slot_starts: [m + 1] int32, each distinct row's first slot.
        sites: the linears that may have routers; None for any.
        gains: whether an expert may have gains; None: as the table knows.
    """

    units: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    limits: torch.Tensor
    renormalize: torch.Tensor
    top_p: torch.Tensor
    temperature: torch.Tensor
    activations: torch.Tensor
    sum_rows: torch.Tensor
    slot_starts: torch.Tensor
    score_places: torch.Tensor
    tile_units: torch.Tensor
    tile_firsts: torch.Tensor
    tile_counts: torch.Tensor
    most: int
    max_experts: int
    block_rows: int
    sites: frozenset[str] | None
    gains: bool | None

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, torch.Tensor],
        most: int,
        max_experts: int,
        block_rows: int,
        sites: frozenset[str] | None = None,
        gains: bool | None = None,
    ) -> DeviceRouted:
        """The arrays of ``RoutedLists.arrays(most)``, padded.

        Raises:
            ValueError: ``most`` or ``max_experts`` is no power of two, or there are too few experts.
        """
        if most != power_of_two(most) or max_experts != power_of_two(max_experts) or max_experts < MIN_EXPERTS:
            raise ValueError(
                f"most {most} and max_experts {max_experts} must be powers of two, the latter at least {MIN_EXPERTS}"
            )
        named = {name: arrays[name] for name in PADDING}
        return cls(**named, most=most, max_experts=max_experts, block_rows=block_rows, sites=sites, gains=gains)

    @property
    def num_slots(self) -> int:
        return len(self.units) * self.most
