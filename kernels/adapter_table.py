"""Where every resident adapter's rows lie, in device buffers of fixed size and address that kernels look up by unit.

A *unit* is an adapter's own pairs or those of one of its experts; an adapter has consecutive units, its own first. For
each unit and layer ``record_of`` names a record, and a record says for each site where A, B and the gains begin.
Entering and leaving adapters change what lies in the buffers and never the buffers, so a captured graph stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.lora_rows import ResidentAdapter, RouterLayoutLike, SiteLayoutLike

RANK, A_START, B_START, GAIN_START = range(4)
FIELDS = 4
"""Of a site in a record: its rank (0: absent) and where its rows begin, in chunks; no gains are -1."""

ROUTER_EXPERTS, ROUTER_START = range(2)
ROUTER_FIELDS = 2
"""Of a router in a record: its number of experts (0: absent) and where its rows begin, in chunks."""

NO_RECORD = -1

Int32Array = npt.NDArray[np.int32]


class TableFull(RuntimeError):
    """An adapter needs more units, records or page entries than are free in one run."""


@dataclass(frozen=True, slots=True)
class TableCapacity:
    """How much an ``AdapterTable`` holds: units, records (one per unit and distinct layer layout), page ids."""

    units: int
    records: int
    pages: int


class _Runs:
    """Hands out runs of consecutive indices, the first that is long enough."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._free = [(0, size)]

    def take(self, count: int) -> int:
        for i, (start, length) in enumerate(self._free):
            if length >= count:
                self._free[i : i + 1] = [(start + count, length - count)] if length > count else []
                return start
        free = sum(length for _, length in self._free)
        raise TableFull(f"{self._name}: {count} in one run are needed, {free} are free; give the table more of them")

    def give_back(self, start: int, count: int) -> None:
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, count)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged


@dataclass(frozen=True, slots=True)
class _Place:
    """What an adapter takes of the table: the start and length of each run."""

    units: tuple[int, int]
    records: tuple[int, int]
    pages: tuple[int, int]


class AdapterTable:
    """Records of all resident adapters.

    Args:
        layer_groups: the sites of a layer, by groups that read the same input, in image order.
        model_groups: the sites that belong to no layer, likewise.
        num_layers: of the model.
        page_chunks: chunks of a page in one layer.
        capacity: sizes of the buffers.
        device: where the kernels read them.

    Attributes:
        pages: [capacity.pages] int32, page lists.
        first_page: [capacity.units] int32, where a unit's page list begins in ``pages``.
        record_of: [capacity.units, num_layers + 1] int32; the last column is for model sites; -1 where there is none.
        records: [capacity.records, num_sites, FIELDS] int32.
        scales: [capacity.records, num_sites] float32.
        routers: [capacity.records, num_sites + 1, ROUTER_FIELDS] int32 by routed site; the last is a feed-forward
            network's.
    """

    def __init__(
        self,
        layer_groups: Sequence[Sequence[str]],
        model_groups: Sequence[Sequence[str]],
        *,
        num_layers: int,
        page_chunks: int,
        capacity: TableCapacity,
        device: torch.device,
    ) -> None:
        self.page_chunks = page_chunks
        self.num_layers = num_layers
        self._groups = (layer_groups, model_groups)
        self.layer_sites = [site for group in layer_groups for site in group]
        self.model_sites = [site for group in model_groups for site in group]
        self.num_sites = max(len(self.layer_sites), len(self.model_sites))
        shapes: dict[str, tuple[int, ...]] = {
            "pages": (capacity.pages,),
            "first_page": (capacity.units,),
            "record_of": (capacity.units, num_layers + 1),
            "records": (capacity.records, self.num_sites, FIELDS),
            "routers": (capacity.records, self.num_sites + 1, ROUTER_FIELDS),
        }
        self._host: dict[str, torch.Tensor] = {
            name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()
        }
        self._host["scales"] = torch.zeros((capacity.records, self.num_sites), dtype=torch.float32)
        self._host["record_of"].fill_(NO_RECORD)
        device_side = {name: host.to(device, copy=True) for name, host in self._host.items()}
        self._device_side = device_side
        self.pages = device_side["pages"]
        self.first_page = device_side["first_page"]
        self.record_of = device_side["record_of"]
        self.records = device_side["records"]
        self.scales = device_side["scales"]
        self.routers = device_side["routers"]
        self._units = _Runs("units", capacity.units)
        self._records = _Runs("records", capacity.records)
        self._pages = _Runs("pages", capacity.pages)
        self._places: dict[int, _Place] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the low-rank kernels take: pages, first_page, record_of, records, scales."""
        return [self.pages, self.first_page, self.record_of, self.records, self.scales]

    def unit_of(self, adapter: ResidentAdapter, expert: int | None = None) -> int:
        """The unit of an adapter's own pairs, or of one of its experts."""
        return self._places[id(adapter)].units[0] + (0 if expert is None else 1 + expert)

    def add(self, adapter: ResidentAdapter) -> int:
        """Enter an adapter and return its first unit.

        Raises:
            TableFull: where a buffer has too few left in one run; nothing has changed then.
            ValueError: where the A matrices of a group do not follow one another.
        """
        layout = adapter.layout
        num_units = 1 + max(len(mixture.experts) for mixture in layout.mixtures)
        num_records = num_units * len(layout.layouts) + 1
        self._check_groups(adapter)
        place = self._take(num_units, num_records, len(adapter.pages))
        self._places[id(adapter)] = place
        self._fill(adapter, place)
        self._send(place)
        return place.units[0]

    def remove(self, adapter: ResidentAdapter) -> None:
        """Forget an adapter; steps that name its units must be over."""
        place = self._places.pop(id(adapter))
        self._host["record_of"][slice(place.units[0], sum(place.units))] = NO_RECORD
        self._send(place)
        self._give_back(place)

    def ranks(self, units: npt.NDArray[np.int64], layer: int | None, first_site: int, num_sites: int) -> Int32Array:
        """[n, num_sites] ranks of units at consecutive sites, 0 where a site is absent; ``layer`` None: model sites."""
        return self._fields(units, layer, first_site, num_sites, RANK)

    def has_gains(self, units: npt.NDArray[np.int64], layer: int | None, first_site: int, num_sites: int) -> bool:
        """Whether any of these units has gains at any of these sites."""
        # An image begins with a row of A, so no gains begin at 0, which stands where a site is absent.
        return bool((self._fields(units, layer, first_site, num_sites, GAIN_START) > 0).any())

    def _fields(
        self, units: npt.NDArray[np.int64], layer: int | None, first_site: int, num_sites: int, field: int
    ) -> Int32Array:
        column = self.num_layers if layer is None else layer
        found: Int32Array = self._host["record_of"].numpy()[units, column]
        fields: Int32Array = self._host["records"].numpy()[found, first_site : first_site + num_sites, field]
        return np.where(found[:, None] == NO_RECORD, np.int32(0), fields)

    def first_site(self, sites: Sequence[str], layer: int | None) -> int:
        """The index of the first of a group's sites, which must be consecutive."""
        known = self.model_sites if layer is None else self.layer_sites
        first = known.index(sites[0])
        if list(sites) != known[first : first + len(sites)]:
            raise ValueError(f"sites: {list(sites)} do not follow one another in {known}")
        return first

    def _take(self, num_units: int, num_records: int, num_pages: int) -> _Place:
        wanted = ((self._units, num_units), (self._records, num_records), (self._pages, num_pages))
        taken: list[tuple[int, int]] = []
        for runs, count in wanted:
            try:
                taken.append((runs.take(count), count))
            except TableFull:
                for (before, _), run in zip(wanted, taken):
                    before.give_back(*run)
                raise
        return _Place(*taken)

    def _give_back(self, place: _Place) -> None:
        self._units.give_back(*place.units)
        self._records.give_back(*place.records)
        self._pages.give_back(*place.pages)

    def _check_groups(self, adapter: ResidentAdapter) -> None:
        layout = adapter.layout
        experts = [expert for mixture in layout.mixtures for expert in mixture.experts]
        for sites in (*layout.layouts, *experts):
            for group in self._groups[0]:
                _check_group([sites[site] for site in group if site in sites], group)

    def _fill(self, adapter: ResidentAdapter, place: _Place) -> None:
        layout, host = adapter.layout, self._host
        (first_unit, num_units), (record, _), (first_page, num_pages) = place.units, place.records, place.pages
        host["pages"][first_page : first_page + num_pages] = torch.tensor(adapter.pages, dtype=torch.int32)
        host["first_page"][first_unit : first_unit + num_units] = first_page
        num_classes = len(layout.layouts)
        classes = torch.tensor(layout.layout_of_layer, dtype=torch.int32)
        for index in range(num_units):
            record_of = host["record_of"][first_unit + index]
            record_of[:-1] = record + index * num_classes + classes
            record_of[-1] = NO_RECORD
            for number, (plain, mixture) in enumerate(zip(layout.layouts, layout.mixtures)):
                experts = mixture.experts
                sites = plain if index == 0 else experts[index - 1] if index <= len(experts) else {}
                self._store(record + index * num_classes + number, sites, self.layer_sites)
                self._store_routers(record + index * num_classes + number, mixture.routers if index == 0 else {})
        last = record + num_units * num_classes
        host["record_of"][first_unit, -1] = last
        self._store(last, layout.model, self.model_sites)

    def _store(self, record: int, sites: Mapping[str, SiteLayoutLike], known: Sequence[str]) -> None:
        fields, scales = self._host["records"][record].numpy(), self._host["scales"][record].numpy()
        fields[:] = 0
        for index, site in enumerate(known):
            if site in sites:
                at = sites[site]
                gain = NO_RECORD if at.gain_start is None else at.gain_start
                fields[index] = (at.rank, at.a_start, at.b_start, gain)
                scales[index] = at.scale

    def _store_routers(self, record: int, routers: Mapping[str, RouterLayoutLike]) -> None:
        fields = self._host["routers"][record].numpy()
        fields[:] = 0
        for site, at in routers.items():
            index = self.layer_sites.index(site) if site in self.layer_sites else self.num_sites
            fields[index] = (at.num_experts, at.start)

    def _send(self, place: _Place) -> None:
        runs = {
            "pages": place.pages,
            "first_page": place.units,
            "record_of": place.units,
            "records": place.records,
            "scales": place.records,
            "routers": place.records,
        }
        for name, (start, count) in runs.items():
            here = slice(start, start + count)
            self._device_side[name][here].copy_(self._host[name][here])


def _check_group(present: Sequence[SiteLayoutLike], group: Sequence[str]) -> None:
    for before, after in pairwise(present):
        if after.a_start != before.a_start + before.rank * before.a_stride:
            raise ValueError(f"layout: the A matrices of {list(group)} must follow one another, as in an adapter image")
