"""What a step yields from its logits: a token for each sequence that is due, and log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.server.batch import LogitRow
from loraplex.server.request import Sequence
from loraplex.server.sampler import RankedLogprobs, SampledTensors, log_probabilities, sample_batch, send_arrays
from loraplex.server.sampling_batch import SamplingBatch
from loraplex.server.step_plan import Chunk, StepResult

_LOGPROB_ROWS = 256
"""Rows of prompt log-probabilities worked out at a time; bounds memory at large vocabularies."""


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Log-probabilities of some prompt tokens: whose, which, how many of the best beside each."""

    sequences: list[Sequence]
    tokens: list[int]
    num_top: list[int]
    logprobs: RankedLogprobs


@dataclass(frozen=True, slots=True)
class LogitResults:
    """Results on the device, or on the host once they have been copied.

    Attributes:
        chunks: of the step.
        sequences: those that sample.
        sampled: for them; None where there are none.
        prompts: log-probabilities of prompt tokens.
    """

    chunks: SequenceOf[Chunk]
    sequences: list[Sequence]
    sampled: SampledTensors | None
    prompts: list[_PromptPart]

    def to_host(self) -> LogitResults:
        """Copies on the host, which are there once the device has got so far."""
        prompts = [_PromptPart(p.sequences, p.tokens, p.num_top, p.logprobs.to_host()) for p in self.prompts]
        return LogitResults(self.chunks, self.sequences, self.sampled and self.sampled.to_host(), prompts)

    def read(self) -> StepResult:
        """What the scheduler is told."""
        result = StepResult()
        for chunk in self.chunks:  # a chunk of the last prompt token alone predicts none
            if chunk.wants_prompt_logprobs:
                result.prompt_logprobs[chunk.sequence.seq_id] = []
        for part in self.prompts:
            for sequence, entry in zip(part.sequences, part.logprobs.read(part.tokens, part.num_top)):
                result.prompt_logprobs[sequence.seq_id].append(entry)
        if self.sampled is not None:
            tokens = self.sampled.read()
            result.sampled.update((sequence.seq_id, token) for sequence, token in zip(self.sequences, tokens))
        return result


def read_logits(logits: torch.Tensor, chunks: SequenceOf[Chunk], wanted: SequenceOf[LogitRow] | None) -> LogitResults:
    """Sample and report, without waiting for the device.

    Args:
        logits: [n, vocabulary] float32; may be changed.
        chunks: of the step.
        wanted: what each row is for; None where row i is the sample of chunk i.
    """
    if wanted is None:
        sequences = [chunk.sequence for chunk in chunks]
        return LogitResults(chunks, sequences, _sample(logits, sequences), [])
    due = [place for place, want in enumerate(wanted) if _is_sampled(want)]
    prompt = [place for place, want in enumerate(wanted) if not _is_sampled(want)]
    prompts = _prompt_logprobs(logits, wanted, prompt)
    sequences = [wanted[place].chunk.sequence for place in due]
    if not due:
        return LogitResults(chunks, [], None, prompts)
    return LogitResults(chunks, sequences, _sample(_rows(logits, due), sequences), prompts)


def _sample(logits: torch.Tensor, sequences: list[Sequence]) -> SampledTensors:
    return sample_batch(logits, SamplingBatch.of(sequences, logits.shape[1]))


def _is_sampled(want: LogitRow) -> bool:
    return want.chunk.samples and want.position == want.chunk.stop - 1


def _rows(logits: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Rows of the logits, in tensors of their own."""
    return logits.index_select(0, _index(places, logits.device))


def _index(values: list[int], device: torch.device) -> torch.Tensor:
    return send_arrays({"index": np.array(values, dtype=np.int64)}, device)["index"]


def _prompt_logprobs(logits: torch.Tensor, wanted: SequenceOf[LogitRow], places: list[int]) -> list[_PromptPart]:
    found = []
    for at in range(0, len(places), _LOGPROB_ROWS):
        here = places[at : at + _LOGPROB_ROWS]
        sequences = [wanted[place].chunk.sequence for place in here]
        tokens = [s.prompt_ids[wanted[place].position + 1] for s, place in zip(sequences, here)]
        num_top = [s.request.params.prompt_logprobs or 0 for s in sequences]
        logprobs = log_probabilities(_rows(logits, here))
        ranked = RankedLogprobs.of(logprobs, _index(tokens, logits.device), max(num_top))
        found.append(_PromptPart(sequences, tokens, num_top, ranked))
    return found
