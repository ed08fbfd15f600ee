"""Where every resident adapter's rows lie, in device buffers that kernels look up by unit.

A *unit* is an adapter's own pairs or those of one of its experts; an adapter has consecutive units, its own first. For
each unit and layer ``record_of`` names a record, and a record says for each site where A, B and the gains begin.
Entering and leaving adapters change what lies in the buffers; only where one is full, or where a launch was made for
lesser ranks, does ``AdapterTable.generation`` rise, and graphs captured before must be captured again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.lora_rows import ResidentAdapter, RouterLayoutLike, SiteGroup, SiteLayoutLike
from loraplex.kernels.triton_runtime import power_of_two

RANK, A_START, B_START, GAIN_START = range(4)
FIELDS = 4
"""Of a site in a record: its rank (0: absent) and where its rows begin, in chunks; no gains are -1."""

ROUTER_EXPERTS, ROUTER_START = range(2)
ROUTER_FIELDS = 2
"""Of a router in a record: its number of experts (0: absent) and where its rows begin, in chunks."""

NO_RECORD = -1

MIN_RANK = 16
"""Of a group, so that few adapters of low rank do not make launches differ."""

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TableCapacity:
    """What a table has room for at first: units, records (one per unit and distinct layer layout), page ids."""

    units: int = 64
    records: int = 256
    pages: int = 4096


class _Runs:
    """Hands out runs of consecutive indices, the first that is long enough."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)]

    def take(self, count: int) -> int | None:
        """The start of a run; None where none is long enough."""
        for i, (start, length) in enumerate(self._free):
            if length >= count:
                self._free[i : i + 1] = [(start + count, length - count)] if length > count else []
                return start
        return None

    def give_back(self, start: int, count: int) -> None:
        at = bisect_left(self._free, (start, 0))
        stop = at
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start, count = self._free[at][0], self._free[at][1] + count
        if stop < len(self._free) and self._free[stop][0] == start + count:
            count += self._free[stop][1]
            stop += 1
        self._free[at:stop] = [(start, count)]

    def grow(self, size: int) -> None:
        """Add what lies between the old size and the new one."""
        old, self.size = self.size, size
        self.give_back(old, size - old)


@dataclass(frozen=True, slots=True)
class _Place:
    """What an adapter takes of the table: the start and length of each run."""

    units: tuple[int, int]
    records: tuple[int, int]
    pages: tuple[int, int]

    def of(self, buffer: str) -> tuple[int, int]:
        """Its run of a buffer."""
        run: tuple[int, int] = getattr(self, _KIND[buffer])
        return run


_KIND = {
    "pages": "pages",
    "first_page": "units",
    "record_of": "units",
    "records": "records",
    "scales": "records",
    "routers": "records",
}
"""By what each buffer is indexed."""


class AdapterTable:
    """Records of all resident adapters.

    A buffer that is full is replaced by one of twice the size, so every set of adapters that the pool holds fits.

    Args:
        layer_groups: the sites of a layer, by groups that read the same input, in image order.
        model_groups: the sites that belong to no layer, likewise.
        num_layers: of the model.
        page_chunks: chunks of a page in one layer.
        device: where the kernels read them.
        capacity: first sizes of the buffers.
        expected_rank: of adapters on every site of a layer that launches are to allow for from the start; 0: of none.

    Attributes:
        generation: rises with whatever a captured launch holds and is no longer so: the address of a buffer, the
            largest rank of a group, whether it is adapted at all, whether there are gains. Units keep their numbers.
        has_gains: whether any adapter that was ever entered has gains.
        pages: [capacity.pages] int32, page lists.
        first_page: [capacity.units] int32, where a unit's page list begins in ``pages``.
        record_of: [capacity.units, num_layers + 1] int32; the last column is for model sites; -1 where there is none.
        records: [capacity.records, num_sites, FIELDS] int32.
        scales: [capacity.records, num_sites] float32.
        routers: [capacity.records, num_sites + 1, ROUTER_FIELDS] int32 by routed site; the last is a feed-forward
            network's.
    """

    pages: torch.Tensor
    first_page: torch.Tensor
    record_of: torch.Tensor
    records: torch.Tensor
    scales: torch.Tensor
    routers: torch.Tensor

    def __init__(
        self,
        layer_groups: Sequence[SiteGroup],
        model_groups: Sequence[SiteGroup],
        *,
        num_layers: int,
        page_chunks: int,
        device: torch.device,
        capacity: TableCapacity = TableCapacity(),
        expected_rank: int = 0,
    ) -> None:
        self.page_chunks = page_chunks
        self.num_layers = num_layers
        self.layer_groups = tuple(layer_groups)
        self.model_groups = tuple(model_groups)
        self.layer_sites = [site for group in layer_groups for site in group.sites]
        self.model_sites = [site for group in model_groups for site in group.sites]
        self.num_sites = max(len(self.layer_sites), len(self.model_sites))
        self.generation = 0
        self.has_gains = False
        self._device = device
        self._expected_rank = expected_rank
        self._runs = {kind: _Runs(getattr(capacity, kind)) for kind in ("units", "records", "pages")}
        self._host: dict[str, npt.NDArray[Any]] = {}
        for buffer, kind in _KIND.items():
            self._replace(buffer, self._runs[kind].size)
        self._places: dict[int, _Place] = {}
        self._ranks: dict[tuple[bool, int, int], int] = {}
        for layer, groups in ((0, self.layer_groups), (None, self.model_groups)):
            for group in groups:
                self.adapts(group.sites, layer)

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
            ValueError: where the A matrices of a group do not follow one another; nothing has changed then.
        """
        layout = adapter.layout
        num_units = 1 + max(len(mixture.experts) for mixture in layout.mixtures)
        num_records = num_units * len(layout.layouts) + 1
        self._check_groups(adapter)
        place = _Place(
            (self._take("units", num_units), num_units),
            (self._take("records", num_records), num_records),
            (self._take("pages", len(adapter.pages)), len(adapter.pages)),
        )
        self._places[id(adapter)] = place
        self._fill(adapter, place)
        self._note(place)
        self._send(place, _KIND)
        return place.units[0]

    def remove(self, adapter: ResidentAdapter) -> None:
        """Forget an adapter; steps that name its units must be over."""
        place = self._places.pop(id(adapter))
        self._host["record_of"][slice(place.units[0], sum(place.units))] = NO_RECORD
        self._send(place, ("record_of",))
        for kind, runs in self._runs.items():
            runs.give_back(*getattr(place, kind))

    def group_rank(self, sites: Sequence[str], layer: int | None) -> int:
        """A power of two from 16 that no unit's sum of ranks at these sites was ever above; ``layer`` None: of model
        sites. The same for all layers, so that launches are alike."""
        key = (layer is None, self.first_site(sites, layer), len(sites))
        return max(self._most_rank(key), MIN_RANK)

    def adapts(self, sites: Sequence[str], layer: int | None) -> bool:
        """Whether any unit that was ever entered has any of these sites; ``layer`` None: of model sites."""
        return self._most_rank((layer is None, self.first_site(sites, layer), len(sites))) > 0

    def ranks(
        self, units: npt.NDArray[np.integer[Any]], layer: int | None, first_site: int, num_sites: int
    ) -> Int32Array:
        """[n, num_sites] ranks of units at consecutive sites, 0 where a site is absent; ``layer`` None: model sites."""
        return self._fields(units, layer, first_site, num_sites, RANK)

    def ranks_by_column(self, units: npt.NDArray[np.integer[Any]], first_site: int, num_sites: int) -> Int32Array:
        """[n, num_layers + 1, num_sites] ranks in every column, of layer or of model sites as the column has them."""
        found = self._host["record_of"][units]
        fields: Int32Array = self._host["records"][found, first_site : first_site + num_sites, RANK]
        return np.where(found[:, :, None] == NO_RECORD, np.int32(0), fields)

    def gains_at(self, units: npt.NDArray[np.integer[Any]], layer: int | None, first_site: int, num_sites: int) -> bool:
        """Whether any of these units has gains at any of these sites."""
        # An image begins with a row of A, so no gains begin at 0, which stands where a site is absent.
        return bool((self._fields(units, layer, first_site, num_sites, GAIN_START) > 0).any())

    def _fields(
        self, units: npt.NDArray[np.integer[Any]], layer: int | None, first_site: int, num_sites: int, field: int
    ) -> Int32Array:
        column = self.num_layers if layer is None else layer
        found: Int32Array = self._host["record_of"][units, column]
        fields: Int32Array = self._host["records"][found, first_site : first_site + num_sites, field]
        return np.where(found[:, None] == NO_RECORD, np.int32(0), fields)

    def first_site(self, sites: Sequence[str], layer: int | None) -> int:
        """The index of the first of a group's sites, which must be consecutive."""
        known = self.model_sites if layer is None else self.layer_sites
        first = known.index(sites[0])
        if list(sites) != known[first : first + len(sites)]:
            raise ValueError(f"sites: {list(sites)} do not follow one another in {known}")
        return first

    def _take(self, kind: str, count: int) -> int:
        runs = self._runs[kind]
        start = runs.take(count)
        if start is None:
            size = runs.size
            while size < runs.size + count:
                size *= 2
            runs.grow(size)
            for buffer in (buffer for buffer, its_kind in _KIND.items() if its_kind == kind):
                self._replace(buffer, size)
            self.generation += 1
            start = runs.take(count)
            assert start is not None
        return start

    def _replace(self, buffer: str, size: int) -> None:
        """Give a buffer another size, with the content that it has."""
        shapes: dict[str, tuple[int, ...]] = {
            "record_of": (self.num_layers + 1,),
            "records": (self.num_sites, FIELDS),
            "scales": (self.num_sites,),
            "routers": (self.num_sites + 1, ROUTER_FIELDS),
        }
        shape = (size, *shapes.get(buffer, ()))
        dtype = np.float32 if buffer == "scales" else np.int32
        host = np.full(shape, NO_RECORD if buffer == "record_of" else 0, dtype=dtype)
        if buffer in self._host:
            host[: len(self._host[buffer])] = self._host[buffer]
        self._host[buffer] = host
        setattr(self, buffer, torch.empty_like(torch.from_numpy(host), device=self._device))
        self._copy(buffer, slice(None))

    def _note(self, place: _Place) -> None:
        """Keep the facts that launches go by: the largest ranks, and whether there are gains."""
        before = self._ranks_before(place)
        for key in self._ranks:
            self._raise_rank(key, before)
        start, count = place.records
        if not self.has_gains and (self._host["records"][start : start + count, :, GAIN_START] > 0).any():
            self.has_gains = True
            self.generation += 1

    def _most_rank(self, key: tuple[bool, int, int]) -> int:
        if key not in self._ranks:
            of_model, _, count = key
            expected = 0 if of_model else self._expected_rank * count
            self._ranks[key] = power_of_two(expected) if expected else 0
            generation = self.generation
            for place in self._places.values():
                self._raise_rank(key, self._ranks_before(place))
            self.generation = generation  # nobody was told less before
        return self._ranks[key]

    def _ranks_before(self, place: _Place) -> tuple[Int32Array, Int32Array]:
        """[records, sites + 1] sums of the ranks before each site, of an adapter's layers and of its model sites."""
        start, count = place.records
        sums = np.zeros((count, self.num_sites + 1), dtype=np.int32)
        np.cumsum(self._host["records"][start : start + count, :, RANK], axis=1, out=sums[:, 1:])
        return sums[:-1], sums[-1:]  # the last record is that of model sites

    def _raise_rank(self, key: tuple[bool, int, int], ranks_before: tuple[Int32Array, Int32Array]) -> None:
        of_model, first, count = key
        sums = ranks_before[of_model]
        most = int((sums[:, first + count] - sums[:, first]).max(initial=0))
        if most > self._ranks[key]:
            self._ranks[key] = max(power_of_two(most), MIN_RANK)
            self.generation += 1

    def _check_groups(self, adapter: ResidentAdapter) -> None:
        layout = adapter.layout
        experts = [expert for mixture in layout.mixtures for expert in mixture.experts]
        for sites in (*layout.layouts, *experts):
            for group in self.layer_groups:
                _check_group([sites[site] for site in group.sites if site in sites], group.sites)

    def _fill(self, adapter: ResidentAdapter, place: _Place) -> None:
        layout, host = adapter.layout, self._host
        (first_unit, num_units), (record, num_records), (first_page, num_pages) = (
            place.units,
            place.records,
            place.pages,
        )
        host["pages"][first_page : first_page + num_pages] = adapter.pages
        host["first_page"][first_unit : first_unit + num_units] = first_page
        for buffer in ("records", "scales", "routers"):
            host[buffer][record : record + num_records] = 0
        num_classes = len(layout.layouts)
        firsts = record + num_classes * np.arange(num_units, dtype=np.int32)
        record_of = host["record_of"][first_unit : first_unit + num_units]
        record_of[:, :-1] = firsts[:, None] + np.array(layout.layout_of_layer, dtype=np.int32)
        record_of[:, -1] = NO_RECORD
        for number, (plain, mixture) in enumerate(zip(layout.layouts, layout.mixtures)):
            for index, sites in enumerate((plain, *mixture.experts)):
                self._store(record + index * num_classes + number, sites, self.layer_sites)
            self._store_routers(record + number, mixture.routers)
        last = record + num_units * num_classes
        record_of[0, -1] = last
        self._store(last, layout.model, self.model_sites)

    def _store(self, record: int, sites: Mapping[str, SiteLayoutLike], known: Sequence[str]) -> None:
        fields, scales = self._host["records"][record], self._host["scales"][record]
        for index, site in enumerate(known):
            if site in sites:
                at = sites[site]
                gain = NO_RECORD if at.gain_start is None else at.gain_start
                fields[index] = (at.rank, at.a_start, at.b_start, gain)
                scales[index] = at.scale

    def _store_routers(self, record: int, routers: Mapping[str, RouterLayoutLike]) -> None:
        fields = self._host["routers"][record]
        for site, at in routers.items():
            index = self.layer_sites.index(site) if site in self.layer_sites else self.num_sites
            fields[index] = (at.num_experts, at.start)

    def _send(self, place: _Place, buffers: Iterable[str]) -> None:
        for buffer in buffers:
            start, count = place.of(buffer)
            self._copy(buffer, slice(start, start + count))

    def _copy(self, buffer: str, here: slice) -> None:
        """Copy to the device in the order of its stream, without waiting: from pinned memory that lives until then."""
        source, to = torch.from_numpy(self._host[buffer][here]), getattr(self, buffer)[here]
        to.copy_(source.pin_memory() if to.is_cuda else source, non_blocking=True)


def _check_group(present: Sequence[SiteLayoutLike], group: Sequence[str]) -> None:
    for before, after in pairwise(present):
        if after.a_start != before.a_start + before.rank * before.a_stride:
            raise ValueError(f"layout: the A matrices of {list(group)} must follow one another, as in an adapter image")
