"""What the scheduler tells the model runner to do in one step, and what it hears back for each sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from loraplex.server.messages import AdapterRef, RequestFailed, RouterChoice, TokenLogprob
from loraplex.server.request import Sequence, SequenceState


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop - 1`` of a sequence, to be computed in this step; its pages have room for them.

    Attributes:
        sequence: whose tokens.
        start: first token, counted from the start of the prompt; all before it are in the pool.
        stop: behind the last token.
        samples: whether a token is to be sampled from the logits at ``stop - 1``.
        adapters: identities with their weights: none for the base model, one of weight 1, or a mix.
        adapter_start: position from which on the adapters apply; tokens before it are the base model's.
        wants_prompt_logprobs: whether to report the log-probability of every prompt token from ``start + 1`` to
            ``min(stop, len(prompt) - 1)``, both included: those that the chunk's logits predict.
        wants_routing: whether to report the experts that routers choose for the chunk's tokens.
        awaits_token: whether the chunk is one token that the step before samples: the device knows its id, the host
            does so only with that step's result.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    adapters: tuple[tuple[str, float], ...]
    adapter_start: int
    wants_prompt_logprobs: bool
    wants_routing: bool = False
    awaits_token: bool = False


@dataclass(frozen=True, slots=True)
class PageIn:
    """An adapter image to copy into ``pages``, before the forward pass if that reads it."""

    identity: str
    ref: AdapterRef
    pages: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first the page-ins, some of them for later steps, then one forward pass over all chunks.

    Without chunks there is nothing to compute until a request comes, or an adapter that is waited for is no longer
    loading or on its way.
    ``failed`` are requests that ended while the step was planned; their clients are to be told. ``ended`` are sequences
    that ended while the step was the last one launched: what they own is given up when it is over.
    """

    chunks: list[Chunk] = field(default_factory=list)
    page_ins: list[PageIn] = field(default_factory=list)
    failed: list[RequestFailed] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    @property
    def needs_completion(self) -> bool:
        """Whether the step must be completed before the next one is planned: it samples for a sequence whose next token
        cannot be sampled before the id of this one is known."""
        return any(chunk.samples and chunk.sequence.needs_history for chunk in self.chunks)

    def anticipate(self) -> None:
        """Count the step, which is in flight, as done, but for the ids of the tokens that it samples."""
        for chunk in self.chunks:
            sequence = chunk.sequence
            if sequence.state is SequenceState.RUNNING:
                sequence.num_computed = chunk.stop
                if chunk.samples:
                    sequence.expect()


class SampledToken(NamedTuple):
    """The token sampled for a chunk; ``logprob`` where the request asks for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yields, by ``seq_id``: sampled tokens, log-probabilities of the prompt tokens of its chunks, and the
    experts that routers chose, for the sequences that ask."""

    sampled: dict[int, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    routing: dict[int, list[RouterChoice]] = field(default_factory=dict)


class PendingStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what went wrong in it."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The ``PendingStep`` of a runner that computes at once."""

    found: StepResult

    def result(self) -> StepResult:
        return self.found


def cut_chunk(sequence: Sequence, limit: int) -> Chunk:
    """The next tokens of a running sequence, at most ``limit``."""
    start, end = sequence.num_computed, sequence.num_tokens
    stop = min(end, start + limit)
    request = sequence.request
    samples = stop == end and request.params.max_tokens > 0
    return Chunk(
        sequence,
        start,
        stop,
        samples,
        request.adapters or (),
        request.adapter_start,
        sequence.wants_prompt_logprobs and start < len(sequence.prompt_ids),
        request.return_routing and stop > sequence.num_routed,
        sequence.num_pending > 0,
    )
