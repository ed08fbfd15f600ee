"""All adapters of one step, of every kind at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loraplex.kernels.dense_linear import DenseLinear
from loraplex.kernels.lora import add_embedding_lora, add_lora
from loraplex.kernels.lora_plan import EntryBatch
from loraplex.kernels.lora_rows import Int64Array, ResidentAdapter, SiteGroup
from loraplex.kernels.lora_work import EmbeddingRows
from loraplex.kernels.mixture import ACTIVATIONS, FFN, ExpertNetworks, add_routed, run_experts
from loraplex.kernels.router_plan import Choice, Float32Array, RoutedBatch


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """What one router chose for the rows of one adapter.

    Attributes:
        layer: None for a token-wise router.
        site: the linear, "mlp" for a feed-forward network, "token" for a token-wise router.
        adapter: whose router it is.
        rows: [m] rows of the step.
        experts: [m, k] best first.
        weights: [m, k] float32, 0 where an expert is not chosen.
    """

    layer: int | None
    site: str
    adapter: ResidentAdapter
    rows: Int64Array
    experts: npt.NDArray[np.integer[Any]]
    weights: Float32Array


@dataclass(slots=True)
class RouteLog:
    """What the routers of a step chose, in the order in which they ran."""

    records: list[RouteRecord] = field(default_factory=list)

    def add(self, layer: int, site: str, choice: Choice) -> None:
        """Note a choice, adapter by adapter."""
        at = 0
        for part in choice.parts:
            stop = at + len(part.rows)
            here = slice(at, stop)
            record = RouteRecord(
                layer, site, part.adapter, choice.rows[here], choice.experts[here], choice.weights[here]
            )
            self.records.append(record)
            at = stop


class Experts(Protocol):
    """The experts of mixtures of feed-forward networks that the rows of a step chose in one layer."""

    def combine(self, num_rows: int, others: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``sum_e w_e h_e`` of the routed rows; the other rows are those of ``others() [num_rows, ffn]``, if any."""

    def add_down(
        self,
        y: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        down: Callable[[torch.Tensor], torch.Tensor],
        bias: torch.Tensor | None,
    ) -> None:
        """Add what the experts change of down_proj.

        Args:
            y: [rows, hidden], the base product of what ``combine`` made.
            chunks: [num_chunks, 128], the arena of the layer.
            down: the base's down_proj.
            bias: of it; each expert's share of a row has it once.
        """


class LayerAdapters(Protocol):
    """What the adapters of a step's rows change of the base's products, group by group."""

    @property
    def has_experts(self) -> bool:
        """Whether any row is under a mixture of feed-forward networks."""

    def await_layer(self, layer: int) -> None:
        """Let what follows see the rows of this layer of adapters that are still on their way into the pool."""

    def run(
        self, linear: DenseLinear, x: torch.Tensor, chunks: torch.Tensor, layer: int, group: SiteGroup
    ) -> torch.Tensor:
        """``linear(x)``, and ``add`` to it."""

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
    ) -> None:
        """Add all adapters' work at a group of a layer to the base products, in place.

        Args:
            y: [rows, sum of the group's out_features].
            x: [rows, in_features].
            chunks: [num_chunks, 128], the arena of the layer.
            bias: [sum of out_features] that is in ``y``, or None.
        """

    def add_model(self, y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """The same for a group of model sites; ``chunks`` is the whole arena."""

    def add_embedding(self, y: torch.Tensor, tokens: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """The same for the embeddings ``y [rows, hidden]`` of ``tokens [rows]``."""

    def run_experts(
        self,
        gate_up: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
        activation: str,
    ) -> Experts | None:
        """The experts of mixtures of feed-forward networks (see ``mixture.py``), from the base's gate and up.

        ``activation`` is the base's, a name of ``mixture.ACTIVATIONS``.
        """


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """``LayerAdapters`` by plain operators.

    Attributes:
        direct: rows with one adapter of weight 1: their plain pairs.
        listed: rows under a mix, and rows with a token-wise adapter: any number of entries a row.
        linear: rows under adapters whose linears have routers of their own.
        ffn: rows under mixtures of feed-forward networks.
        embedding: the work at the embedding.
        log: where choices are noted; None if nobody asks.
    """

    direct: EntryBatch | None = None
    listed: EntryBatch | None = None
    linear: RoutedBatch | None = None
    ffn: RoutedBatch | None = None
    embedding: tuple[EmbeddingRows, ...] = ()
    log: RouteLog | None = None

    @property
    def has_experts(self) -> bool:
        return self.ffn is not None

    def await_layer(self, layer: int) -> None:
        """Adapters are copied before the step."""

    def run(
        self, linear: DenseLinear, x: torch.Tensor, chunks: torch.Tensor, layer: int, group: SiteGroup
    ) -> torch.Tensor:
        """As in ``LayerAdapters``."""
        y = linear(x)
        self.add(y, x, chunks, layer, group, linear.bias)
        return y

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
    ) -> None:
        """As in ``LayerAdapters``."""
        for batch in (self.direct, self.listed):
            if batch is not None:
                add_lora(y, x, chunks, batch.layer_plan(layer, group), bias=bias)
        if self.linear is not None:
            for site, choice in add_routed(y, x, chunks, layer, group, self.linear, bias):
                self._note(layer, site, choice)

    def add_model(self, y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """As in ``LayerAdapters``."""
        for batch in (self.direct, self.listed):
            if batch is not None:
                add_lora(y, x, chunks, batch.model_plan(group))

    def add_embedding(self, y: torch.Tensor, tokens: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """As in ``LayerAdapters``; the work was planned for these tokens."""
        del tokens, group
        for work in self.embedding:
            add_embedding_lora(y, chunks, work)

    def run_experts(
        self,
        gate_up: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
        activation: str,
    ) -> ExpertNetworks | None:
        """As in ``LayerAdapters``."""
        if self.ffn is None:
            return None
        networks = run_experts(gate_up, x, chunks, layer, group, self.ffn, bias, ACTIVATIONS[activation])
        if networks is not None:
            self._note(layer, FFN, networks.choice)
        return networks

    def _note(self, layer: int, site: str, choice: Choice) -> None:
        if self.log is not None:
            self.log.add(layer, site, choice)
