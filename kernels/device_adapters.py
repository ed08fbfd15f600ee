"""All adapters of one step, of every kind at once, by the kernels for GPUs: ``LayerAdapters`` without a wait for the
host.

What varies from step to step lies in tensors of fixed capacity, so a captured step can be replayed for any mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.dense_linear import DenseLinear
from loraplex.kernels.device_arrays import to_host
from loraplex.kernels.device_mixture import DeviceChoice, DeviceExperts, add_routed, run_experts
from loraplex.kernels.lora_launch import StepWork, add_embedding, add_entries, expand_entries, shrink_entries
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.lora_tiles import DeviceEntries
from loraplex.kernels.mixture import FFN
from loraplex.kernels.routed_lists import DeviceRouted, RoutedLists
from loraplex.kernels.step_adapters import RouteLog, RouteRecord


class Arriving(Protocol):
    """An adapter that is on its way into the pool."""

    def wait(self, layer: int) -> None:
        """Let the device wait until a layer and those before it have arrived."""

    def wait_all(self) -> None:
        """Let the device wait until everything has arrived."""


@dataclass(slots=True)
class ChoiceLog:
    """Choices on the device, to be read when the step is over."""

    _choices: list[tuple[int, str, RoutedLists, DeviceChoice]] = field(default_factory=list)

    def add(self, layer: int, site: str, lists: RoutedLists, choice: DeviceChoice) -> None:
        """Note a choice of the entries of ``lists``."""
        self._choices.append((layer, site, lists, choice))

    def to_host(self) -> None:
        """Queue copies to the host, which are there once the device has got so far."""
        self._choices = [
            (layer, site, lists, DeviceChoice(to_host(choice.experts), to_host(choice.weights)))
            for layer, site, lists, choice in self._choices
        ]

    def read_into(self, log: RouteLog) -> None:
        """Append the choices, which are on the host, adapter by adapter, in the order in which the routers ran."""
        for layer, site, lists, choice in self._choices:
            experts, weights = choice.experts.numpy(), choice.weights.numpy()
            for part, places in zip(lists.parts, lists.places):
                if part.adapter.router(layer, site) is not None:
                    order = np.argsort(part.rows, kind="stable")
                    here = places[order]
                    log.records.append(
                        RouteRecord(layer, site, part.adapter, part.rows[order], experts[here], weights[here])
                    )


@dataclass(frozen=True, slots=True)
class DeviceAdapters:
    """``LayerAdapters`` by kernels over the pool.

    Attributes:
        table: of the adapters in the pool.
        entries: what is known before the step, with its blocks; None where there is nothing.
        linear: rows under adapters whose linears have routers of their own.
        ffn: rows under mixtures of feed-forward networks.
        model_sites: the model sites that any adapter in the pool has.
        arriving: adapters of the step that are on their way.
        linear_lists, ffn_lists: what ``linear`` and ``ffn`` hold, where choices are noted.
        log: where they are noted; None if nobody asks.
        beside: a stream for what can run beside the base's products; None runs all in order.
    """

    table: AdapterTable
    entries: tuple[DeviceEntries, StepWork] | None = None
    linear: DeviceRouted | None = None
    ffn: DeviceRouted | None = None
    model_sites: frozenset[str] = frozenset()
    arriving: Sequence[Arriving] = ()
    linear_lists: RoutedLists | None = None
    ffn_lists: RoutedLists | None = None
    log: ChoiceLog | None = None
    beside: torch.cuda.Stream | None = None

    def await_layer(self, layer: int) -> None:
        """As in ``LayerAdapters``."""
        for adapter in self.arriving:
            adapter.wait(layer)

    @property
    def has_experts(self) -> bool:
        return self.ffn is not None

    def run(
        self, linear: DenseLinear, x: torch.Tensor, chunks: torch.Tensor, layer: int, group: SiteGroup
    ) -> torch.Tensor:
        """As in ``LayerAdapters``. What needs no base product runs beside it, on a stream of its own."""
        if self.beside is None or self.entries is None or self.entries[1].is_idle(group):
            y = linear(x)
            self.add(y, x, chunks, layer, group, linear.bias)
            return y
        main = torch.cuda.current_stream()
        self.beside.wait_stream(main)
        with torch.cuda.stream(self.beside):
            low = shrink_entries(x, chunks, self.table, *self.entries, layer, group)
        y = linear(x)
        # What the side stream frees it takes again only after its next wait, so nothing is overwritten in use.
        main.wait_stream(self.beside)
        if low is not None:
            expand_entries(y, low, chunks, self.table, *self.entries, layer, group, bias=linear.bias)
        self._add_routed(y, x, chunks, layer, group, linear.bias)
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
        if self.entries is not None:
            add_entries(y, x, chunks, self.table, *self.entries, layer, group, bias=bias)
        self._add_routed(y, x, chunks, layer, group, bias)

    def _add_routed(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
    ) -> None:
        if self.linear is not None:
            for site, choice in add_routed(y, x, chunks, self.table, self.linear, layer, group, bias):
                self._note(layer, site, self.linear_lists, choice)

    def add_model(self, y: torch.Tensor, x: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """As in ``LayerAdapters``."""
        if self.entries is not None and self.model_sites.intersection(group.sites):
            self._await_all()
            add_entries(y, x, chunks, self.table, *self.entries, None, group)

    def add_embedding(self, y: torch.Tensor, tokens: torch.Tensor, chunks: torch.Tensor, group: SiteGroup) -> None:
        """As in ``LayerAdapters``."""
        if self.entries is not None and self.model_sites.intersection(group.sites):
            self._await_all()
            add_embedding(y, tokens, chunks, self.table, *self.entries, group)

    def run_experts(
        self,
        gate_up: torch.Tensor,
        x: torch.Tensor,
        chunks: torch.Tensor,
        layer: int,
        group: SiteGroup,
        bias: torch.Tensor | None,
        activation: str,
    ) -> DeviceExperts | None:
        """As in ``LayerAdapters``."""
        if self.ffn is None:
            return None
        experts = run_experts(gate_up, x, chunks, self.table, self.ffn, layer, group, bias, activation)
        self._note(layer, FFN, self.ffn_lists, experts.choice)
        return experts

    def _await_all(self) -> None:
        for adapter in self.arriving:
            adapter.wait_all()

    def _note(self, layer: int, site: str, lists: RoutedLists | None, choice: DeviceChoice) -> None:
        if self.log is not None and lists is not None:
            self.log.add(layer, site, lists, choice)
