"""Mixtures: the chosen experts of a step, of linears and of whole feed-forward networks.

A mixture of feed-forward networks has, for each chosen expert e of a row, ``h_e = act(gate_e) * up_e`` with gate and up
the base's plus the expert's, and ``y = W_down (sum_e w_e h_e) + sum_e w_e s B_e A_e h_e``: the base's gate, up and down
run once per row however many experts it has, since W_down is linear. Only gains of down_proj (MixDoRA) need
``W_down h_e`` of each expert besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from loraplex.kernels.device_arrays import to_device
from loraplex.kernels.lora import add_lora
from loraplex.kernels.lora_rows import Int64Array, SiteGroup
from loraplex.kernels.lora_work import GroupPlan, RowSums
from loraplex.kernels.router_plan import Choice, RoutedBatch
from loraplex.kernels.unit_table import Entries, row_sums

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Activations that experts may have of their own."""

FFN = "mlp"
"""What the router of a mixture of feed-forward networks is called."""

_BLOCK_ENTRIES = 128
"""Entries whose gate and up are worked on at a time; a pass over all of them would go through memory three times."""


def add_routed(
    y: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    layer: int,
    group: SiteGroup,
    batch: RoutedBatch,
    bias: torch.Tensor | None = None,
) -> list[tuple[str, Choice]]:
    """Add ``sum_e w_e s B_e A_e x`` in place at each linear of a group that has a router of its own.

    Args:
        y: [rows, sum of the group's out_features].
        x: [rows, in_features], which the routers read too.
        chunks: [num_chunks, 128], the arena of the layer.
        bias: [sum of out_features] that is in ``y`` and that gains leave alone.

    Returns:
        What was chosen, by linear.
    """
    choices: list[tuple[str, Choice]] = []
    at = 0
    for site, width in zip(group.sites, group.out_features):
        choice = batch.choose(layer, site, x, chunks)
        if choice is not None:
            alone = SiteGroup((site,), group.in_features, (width,))
            plan = batch.units.layer_table(layer, alone).plan(choice.entries)
            here = slice(at, at + width)
            add_lora(y[:, here], x, chunks, plan, bias=None if bias is None else bias[here])
            choices.append((site, choice))
        at += width
    return choices


@dataclass(frozen=True, slots=True)
class ExpertNetworks:
    """The inner activations of the chosen experts: ``hidden [n, ffn]``, one per entry of ``choice``."""

    batch: RoutedBatch
    choice: Choice
    hidden: torch.Tensor
    sums: RowSums

    def combine(self, num_rows: int, others: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``sum_e w_e h_e`` of the routed rows; the other rows are those of ``others() [num_rows, ffn]``, if any."""
        combined = self.sums.of(self.hidden)
        if len(combined) == num_rows:
            return combined
        return others().index_copy_(0, self.sums.rows, combined)

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
            total = to_device(self.choice.weights.sum(axis=1, keepdims=True), y.device)
            rows = to_device(self.choice.rows, y.device)
            y.index_add_(0, rows, ((total - 1) * bias).to(y.dtype))
        plan = self.batch.units.layer_table(layer, group).plan(replace(self.choice.entries, x_rows=None))
        gain_base = down(self.hidden) if plan is not None and plan.has_gains else None
        add_lora(y, self.hidden, chunks, plan, bias=bias, gain_base=gain_base)


def run_experts(
    gate_up: torch.Tensor,
    x: torch.Tensor,
    chunks: torch.Tensor,
    layer: int,
    group: SiteGroup,
    batch: RoutedBatch,
    bias: torch.Tensor | None,
    activation: Activation,
) -> ExpertNetworks | None:
    """Run the chosen experts up to their inner activations; None where no row has a router in this layer.

    Args:
        gate_up: [rows, 2 * ffn], the base products.
        x: [rows, hidden], what gate, up and the router read.
        chunks: [num_chunks, 128], the arena of the layer.
        group: gate_proj and up_proj.
        bias: [2 * ffn] that is in ``gate_up``, or None.
        activation: the base's, for experts without one of their own.
    """
    choice = batch.choose(layer, FFN, x, chunks)
    if choice is None:
        return None
    entries = choice.entries
    assert entries.x_rows is not None
    plan = batch.units.layer_table(layer, group).plan(replace(entries, y_rows=None, weights=None))
    rows = to_device(entries.x_rows, x.device)
    activations = _activations(choice, activation)
    hidden = gate_up.new_empty((len(rows), gate_up.shape[1] // 2))
    for start, stop, work in _blocks(entries, plan):
        wide = gate_up.index_select(0, rows[start:stop])
        add_lora(wide, x, chunks, work, bias=bias)
        gate, up = wide.chunk(2, dim=-1)
        torch.mul(_activate(gate, activations, choice.places[start:stop]), up, out=hidden[start:stop])
    return ExpertNetworks(batch, choice, hidden, row_sums(entries.x_rows, entries.weights, x.device))


def _blocks(entries: Entries, plan: GroupPlan | None) -> Iterator[tuple[int, int, GroupPlan | None]]:
    """Runs of entries with what there is to add to them, few enough that their outputs stay in the cache."""
    short = entries.num_short
    if short:
        gathered = plan.gathered if plan is not None else None
        yield 0, short, None if plan is None or gathered is None else GroupPlan(plan.group, gathered, ())
    segments = {segment.start: segment for segment in plan.segments} if plan is not None else {}
    for _, first, last in entries.long_segments():
        segment = segments.get(first)
        for start in range(first, last, _BLOCK_ENTRIES):
            stop = min(start + _BLOCK_ENTRIES, last)
            if plan is None or segment is None:
                yield start, stop, None
            else:
                yield start, stop, GroupPlan(plan.group, None, (segment.part(start - first, stop - first),))


def _activations(choice: Choice, default: Activation) -> Activation | list[Activation]:
    """The activation of the experts; if they differ, that of each of the choice's rows."""
    named = [part.routing.activation for part in choice.parts]
    found = [default if name is None else ACTIVATIONS[name] for name in named]
    if len(set(named)) == 1:
        return found[0]
    return [activation for activation, part in zip(found, choice.parts) for _ in part.rows]


def _activate(gate: torch.Tensor, activations: Activation | list[Activation], places: Int64Array) -> torch.Tensor:
    """Each entry's gate through the activation of its row."""
    if not isinstance(activations, list):
        return activations(gate)
    used = [activations[place] for place in places.tolist()]
    result = torch.empty_like(gate)
    for activation in set(used):
        same = torch.tensor([i for i, other in enumerate(used) if other is activation], device=gate.device)
        result.index_copy_(0, same, activation(gate.index_select(0, same)))
    return result
