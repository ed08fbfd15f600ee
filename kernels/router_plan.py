"""Routers of a step: which rows they read, and the experts that they choose for each.

All rows of a batch that some adapter routes are scored together, whatever the adapters, and the choice becomes entries
(see ``lora_work.py``) sorted by expert. Every step is a few array operations over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from loraplex.kernels import ops
from loraplex.kernels.device_arrays import stored_rows, to_device
from loraplex.kernels.lora_plan import SHORT_SEGMENT_ROWS, UnitSet, sort_entries
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter, RouterRows, RoutingLike
from loraplex.kernels.unit_table import Entries

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Rows of a step under one adapter that has routers. ``weight`` is the adapter's in a mix."""

    adapter: ResidentAdapter
    rows: Int64Array
    weight: float = 1.0

    @property
    def routing(self) -> RoutingLike:
        assert self.adapter.routing is not None
        return self.adapter.routing


@dataclass(frozen=True, slots=True)
class Choice:
    """What the routers of one site chose.

    Attributes:
        parts: the adapters that have a router here, with their rows.
        rows: [m] rows of the step, adapter by adapter.
        experts: [m, E] best first.
        weights: [m, E] float32, without those of a mix; 0 where an expert is not chosen.
        entries: one per row and chosen expert, sorted; reading and adding to the step's rows.
        places: [n] for each entry, its place among ``rows``.
    """

    parts: tuple[RoutedRows, ...]
    rows: Int64Array
    experts: Int64Array
    weights: Float32Array
    entries: Entries
    places: Int64Array


@dataclass(frozen=True, slots=True)
class _Rules:
    """How each row's experts are chosen: the arguments of ``ops.route``."""

    limits: torch.Tensor
    renormalize: torch.Tensor
    top_p: torch.Tensor
    temperature: torch.Tensor


@dataclass(frozen=True, slots=True)
class _GatheredLogits:
    """Scores of the rows whose adapter has few: one dot product each, placed at ``places`` of the flat logits."""

    num_rows: int
    w_ids: torch.Tensor
    x_ids: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class _RouterPlan:
    """The routers of one site. Rows of adapters with few of them come first."""

    parts: tuple[RoutedRows, ...]
    rows: Int64Array
    row_index: torch.Tensor
    units: Int64Array
    mix_weights: Float32Array
    num_experts: int
    stride: int
    rules: _Rules
    gathered: _GatheredLogits | None
    segments: tuple[tuple[int, int, RouterRows, torch.Tensor | None], ...]

    def logits(self, x: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """[m, E] float32, -inf for experts that a row's adapter does not have."""
        wide = chunks.view(torch.float32)
        rows = x.index_select(0, self.row_index).float()
        out = rows.new_full((len(rows), self.num_experts), -math.inf)
        if self.gathered is not None:
            some = F.pad(rows[: self.gathered.num_rows], (0, self.stride * wide.shape[1] - rows.shape[1]))
            scores = ops.shrink(some.view(-1, wide.shape[1]), wide, self.gathered.w_ids, self.gathered.x_ids)
            out.view(-1).index_copy_(0, self.gathered.places, scores)
        for start, stop, router, gather in self.segments:
            weight = stored_rows(wide, router.ids, gather)[:, : router.in_features]
            out[start:stop, : router.num_experts] = rows[start:stop] @ weight.T
        return out


@dataclass(eq=False, slots=True)
class RoutedBatch:
    """Rows of one step whose adapters have routers of one scope; kept while rows and adapters stay.

    Args:
        parts: by adapter; a row may come under several adapters of a mix.
        units: the experts of these adapters, and of any others.
    """

    parts: tuple[RoutedRows, ...]
    units: UnitSet
    _plans: dict[tuple[object, ...], _RouterPlan | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Adapters with few rows first, as their rows are gathered together.
        self.parts = tuple(sorted(self.parts, key=lambda part: len(part.rows) > SHORT_SEGMENT_ROWS))

    def is_over(self, parts: Sequence[RoutedRows]) -> bool:
        """Whether this batch is over just these parts, in whatever order."""
        mine = {(id(part.adapter), part.weight): part.rows for part in self.parts}
        return len(mine) == len(parts) and all(
            np.array_equal(mine.get((id(part.adapter), part.weight), ()), part.rows) for part in parts
        )

    def choose(self, layer: int, site: str, x: torch.Tensor, chunks: torch.Tensor) -> Choice | None:
        """Route all rows that have a router of ``site`` in this layer; None where none has.

        Args:
            x: [rows, in_features], what the router reads.
            chunks: [num_chunks, 128], the arena of the layer.
        """
        key = (site, self.units.classes(layer))
        if key not in self._plans:
            self._plans[key] = self._plan(layer, site)
        plan = self._plans[key]
        if plan is None:
            return None
        rules = plan.rules
        logits = plan.logits(x, chunks)
        chosen, scores = ops.route(logits, rules.limits, rules.renormalize, rules.top_p, rules.temperature)
        experts, weights = chosen.cpu().numpy(), scores.cpu().numpy()
        places, ranks = np.nonzero(weights)
        entries, order = sort_entries(
            plan.units[places] + experts[places, ranks],
            plan.rows[places],
            weights[places, ranks] * plan.mix_weights[places],
            len(self.units.units),
        )
        return Choice(plan.parts, plan.rows, experts, weights, entries, places[order])

    @property
    def device(self) -> torch.device:
        return self.units.device

    def _plan(self, layer: int, site: str) -> _RouterPlan | None:
        found = [
            (part, self.units.first(part.adapter), router)
            for part in self.parts
            if (router := part.adapter.router(layer, site)) is not None
        ]
        if not found:
            return None
        parts = tuple(part for part, _, _ in found)
        lengths = [len(part.rows) for part in parts]
        rows = np.concatenate([part.rows for part in parts])
        num_experts = max(router.num_experts for _, _, router in found)
        ends = np.cumsum(lengths).tolist()
        spans = [(end - length, end, router) for end, length, (_, _, router) in zip(ends, lengths, found)]
        num_short = sum(length for length in lengths if length <= SHORT_SEGMENT_ROWS)
        return _RouterPlan(
            parts=parts,
            rows=rows,
            row_index=to_device(rows, self.device),
            units=np.repeat(np.array([first for _, first, _ in found], dtype=np.int64), lengths),
            mix_weights=np.repeat(np.array([part.weight for part in parts], dtype=np.float32), lengths),
            num_experts=num_experts,
            stride=found[0][2].ids.shape[1],
            rules=self._rules(parts, lengths),
            gathered=self._gathered(spans, num_short, num_experts),
            segments=tuple(
                (start, stop, router, None if router.contiguous else to_device(router.ids.ravel(), self.device))
                for start, stop, router in spans
                if start >= num_short
            ),
        )

    def _rules(self, parts: Sequence[RoutedRows], lengths: list[int]) -> _Rules:
        routings = [part.routing for part in parts]
        counts = torch.tensor(lengths)

        def by_row(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).repeat_interleave(counts).to(self.device)

        return _Rules(
            limits=by_row([routing.limit for routing in routings], torch.int64),
            renormalize=by_row([routing.renormalize for routing in routings], torch.bool),
            top_p=by_row([math.inf if r.top_p is None else r.top_p for r in routings], torch.float32),
            temperature=by_row([r.temperature if r.temperature > 0 else 1.0 for r in routings], torch.float32),
        )

    def _gathered(
        self, spans: list[tuple[int, int, RouterRows]], num_short: int, num_experts: int
    ) -> _GatheredLogits | None:
        if not num_short:
            return None
        w_ids: list[Int64Array] = []
        owners: list[Int64Array] = []
        places: list[Int64Array] = []
        for start, stop, router in spans:
            if start >= num_short:
                break
            rows = np.repeat(np.arange(start, stop), router.num_experts)
            w_ids.append(np.tile(router.ids, (stop - start, 1)))
            owners.append(rows)
            places.append(rows * num_experts + np.tile(np.arange(router.num_experts), stop - start))
        ids = np.concatenate(w_ids)
        stride = ids.shape[1]
        x_ids = np.concatenate(owners)[:, None] * stride + np.arange(stride)
        w_rows, x_rows, at = (to_device(array, self.device) for array in (ids, x_ids, np.concatenate(places)))
        return _GatheredLogits(num_short, w_rows, x_rows, at)
