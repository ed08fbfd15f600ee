"""Carries out a step: adapters into the pool, one forward pass, one token for each sequence that is due."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.kernels.step_adapters import RouteLog
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.transfer import AdapterTransfer, TransferStats
from loraplex.server.batch import Batch, BatchMaker
from loraplex.server.decoder import Decoder
from loraplex.server.logit_results import read_logits
from loraplex.server.routing_report import ExpertCounts, routing_of_sequences
from loraplex.server.step_plan import Chunk, FinishedStep, PendingStep, StepResult


class ModelRunner:
    """Runs steps on one device.

    Args:
        decoder: the model.
        arena: [num_layers, num_pages, page_elems], the pool's memory.
        batches: makes the tensors.
        expert_counts: counts the choices of routers, where the metrics show them.

    Attributes:
        runs_ahead: whether ``launch`` returns before the step is done and takes chunks that await a token of the step
            before; such a runner is given one step more before the result of the last one is taken.
        transfers: what has been paged in.
    """

    runs_ahead: bool = False

    def __init__(
        self, decoder: Decoder, arena: torch.Tensor, batches: BatchMaker, expert_counts: ExpertCounts | None = None
    ) -> None:
        self._decoder = decoder
        self._arena = arena
        self._batches = batches
        self._expert_counts = expert_counts
        self._resident: dict[str, ResidentAdapter] = {}
        self.transfers = TransferStats()
        self._transfer = AdapterTransfer(arena, self.transfers)

    @property
    def expert_tokens(self) -> dict[str, list[int]]:
        """How often each expert was chosen, by identity, for the adapters with the most; empty where nobody asks."""
        return self._expert_counts.most() if self._expert_counts is not None else {}

    def page_in(self, image: AdapterImage, pages: list[int]) -> None:
        """Copy an adapter into its pages; from now on chunks may name it."""
        self._transfer.page_in(image, pages)
        num_layers, num_pages, page_elems = self._arena.shape
        self._resident[image.identity] = ResidentAdapter(
            image.layout, pages, page_elems // 128, num_layers, num_pages, image.routing, image.token_routes
        )

    def has_arrived(self, identity: str) -> bool:
        """Always: what is copied is there at once."""
        del identity
        return True

    def forget(self, identities: Iterable[str]) -> None:
        """Adapters have left the pool; unknown ones are ignored."""
        for identity in identities:
            self._resident.pop(identity, None)

    def forget_all(self) -> None:
        """Whatever was in the pool is in doubt."""
        self._resident.clear()

    def launch(self, chunks: list[Chunk]) -> PendingStep:
        """Start a step: one forward pass over the chunks, behind all that was started before."""
        return FinishedStep(self.run(chunks))

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> StepResult:
        """One forward pass over the chunks."""
        if not chunks:
            return StepResult()
        batch = self._batches.make(chunks, self._resident)
        logits = self._decoder.forward(batch.step, self._arena)
        result = read_logits(logits, chunks, batch.logit_rows).read()
        if batch.log is not None:
            self._report_routes(batch.log, batch, result)
        return result

    def _report_routes(self, log: RouteLog, batch: Batch, result: StepResult) -> None:
        identities = {adapter: identity for identity, adapter in self._resident.items()}
        result.routing.update(routing_of_sequences(log, batch.pieces, identities))
        if self._expert_counts is not None:
            self._expert_counts.add(log, identities)
