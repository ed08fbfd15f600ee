"""The order in which the published programs run a mixture: adapter by adapter, expert by expert, every base product
again for each. Weights, base products and attention are the engine's own; only the feed-forward network differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from loraplex.kernels.dense_linear import DenseLinear
from loraplex.kernels.step_adapters import LayerAdapters
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair
from loraplex.server.decoder import Decoder


class PlainMixtureDecoder(Decoder):
    """A decoder whose mixtures run in that order.

    ``assign`` says which rows belong to which adapter before each step.
    """

    def assign(self, rows: Sequence[tuple[AdapterSpec, torch.Tensor]]) -> None:
        """The rows of each adapter of the steps to come."""
        self._assigned = [(_by_place(spec), _routers(spec), index) for spec, index in rows]

    def _feed_forward(
        self, layer: int, x: torch.Tensor, adapters: LayerAdapters | None, arena: torch.Tensor
    ) -> torch.Tensor:
        weights = self._weights.layers[layer]
        y = torch.zeros_like(x)
        for pairs, routers, rows in self._assigned:
            own = x.index_select(0, rows)
            scores, experts = F.linear(own, routers[layer]).softmax(-1).topk(2)
            scores = scores / scores.sum(-1, keepdim=True)
            for expert in range(len(routers[layer])):
                at, rank = (experts == expert).nonzero(as_tuple=True)
                if len(at):
                    out = _expert(own.index_select(0, at), weights.gate_up, weights.down, pairs, layer, expert)
                    y.index_add_(0, rows[at], out * scores[at, rank, None])
        return y


def _expert(
    x: torch.Tensor,
    gate_up: DenseLinear,
    down: DenseLinear,
    pairs: Mapping[tuple[int, str, int], LowRankPair],
    layer: int,
    expert: int,
) -> torch.Tensor:
    gate, up = gate_up(x).chunk(2, dim=-1)
    gate = gate + _delta(x, pairs[layer, "gate_proj", expert])
    up = up + _delta(x, pairs[layer, "up_proj", expert])
    h = F.silu(gate) * up
    return down(h) + _delta(h, pairs[layer, "down_proj", expert])


def _delta(x: torch.Tensor, pair: LowRankPair) -> torch.Tensor:
    return (x @ pair.a.T) @ pair.b.T * pair.scale


def _by_place(spec: AdapterSpec) -> dict[tuple[int, str, int], LowRankPair]:
    return {
        (pair.layer, pair.site, pair.expert): pair
        for pair in spec.pairs
        if pair.layer is not None and pair.expert is not None
    }


def _routers(spec: AdapterSpec) -> dict[int, torch.Tensor]:
    return {router.layer: router.weight for router in spec.routers}
