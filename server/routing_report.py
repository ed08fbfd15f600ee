"""What routers chose in a step, for the requests that ask and for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter
from loraplex.kernels.step_adapters import RouteLog, RouteRecord
from loraplex.server.batch import Piece
from loraplex.server.messages import RouterChoice

_TRACKED_PER_REPORTED = 8
"""So many times as many adapters are counted as are reported, so that a newcomer can rise among them."""


def routing_of_sequences(
    log: RouteLog, pieces: Sequence[tuple[int, Piece]], identities: Mapping[ResidentAdapter, str]
) -> dict[int, list[RouterChoice]]:
    """The choices for each sequence that asks, by ``seq_id``, under the names of its request's adapters."""
    found: dict[int, list[RouterChoice]] = {}
    for row, piece in pieces:
        if not piece.chunk.wants_routing:
            continue
        choices = found.setdefault(piece.chunk.sequence.seq_id, [])
        adapters = {adapter for adapter, _ in piece.assignment}
        names = {image.identity: image.ref.name for image in piece.chunk.sequence.request.images}
        for record in log.records:
            if record.adapter not in adapters:
                continue
            # Rows under one adapter with different weights have records of their own.
            first = int(np.searchsorted(record.rows, row))
            if first < len(record.rows) and record.rows[first] == row:
                choices.append(_choice(record, first, piece, names[identities[record.adapter]]))
    return found


def _choice(record: RouteRecord, first: int, piece: Piece, name: str) -> RouterChoice:
    here = slice(first, first + piece.stop - piece.start)
    pairs = list(zip(record.experts[here].tolist(), record.weights[here].tolist()))
    return RouterChoice(
        adapter=name,
        layer=record.layer,
        site=record.site,
        start=piece.start,
        experts=[[expert for expert, weight in zip(*pair) if weight] for pair in pairs],
        weights=[[weight for weight in weights if weight] for _, weights in pairs],
    )


class ExpertCounts:
    """How often each expert was chosen, for the adapters with the most routed tokens.

    Args:
        reported: adapters to report at most.
    """

    def __init__(self, reported: int) -> None:
        self._reported = reported
        self._counts: dict[str, Int64Array] = {}

    def add(self, log: RouteLog, identities: Mapping[ResidentAdapter, str]) -> None:
        """Count a step's choices, each expert once for every token, layer and site that chose it."""
        for record in log.records:
            assert record.adapter.routing is not None
            chosen = record.experts[record.weights != 0].astype(np.int64)
            counts = np.bincount(chosen, minlength=record.adapter.routing.num_experts)
            identity = identities[record.adapter]
            self._counts[identity] = self._counts.get(identity, 0) + counts
        if len(self._counts) > self._reported * _TRACKED_PER_REPORTED:
            self._counts = dict(self._most(len(self._counts) // 2))

    def most(self) -> dict[str, list[int]]:
        """Counts by expert, by identity, of the adapters with the most."""
        return {identity: counts.tolist() for identity, counts in self._most(self._reported)}

    def _most(self, number: int) -> list[tuple[str, Int64Array]]:
        return sorted(self._counts.items(), key=lambda item: -int(item[1].sum()))[:number]
