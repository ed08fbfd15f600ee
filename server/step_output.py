"""What a client is told of one step of one choice."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from loraplex.server.messages import FinishReason, RouterChoice, TokenLogprob, TokenOutput
from loraplex.server.request import Sequence
from loraplex.server.step_plan import Chunk, SampledToken


def make_output(sequence: Sequence, result: SampledToken | None, reason: FinishReason | None) -> TokenOutput:
    """The output of a sequence, and what routers chose since the last one.

    Times, cached tokens and the prompt's log-probabilities come with the first one.
    """
    request = sequence.request
    token_ids = [] if result is None else [result.token_id]
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = [] if result is None or result.logprob is None else [result.logprob]
    routing = None
    if request.return_routing:
        routing, sequence.routing = sequence.routing, []
    if sequence.has_output:
        return TokenOutput(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            routing=routing,
        )
    prompt_logprobs = [None, *sequence.prompt_logprobs] if sequence.wants_prompt_logprobs else None
    sequence.has_output = True
    assert sequence.first_scheduled_at is not None
    return TokenOutput(
        request_id=request.request_id,
        index=sequence.index,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        cached_tokens=sequence.cached_tokens,
        queue_seconds=sequence.first_scheduled_at - request.arrival,
        adapter_load_seconds=sequence.adapter_load_seconds,
        routing=routing,
    )


def collect_prompt_logprobs(sequence: Sequence, found: list[TokenLogprob], chunk: Chunk) -> None:
    """Keep for the first output what a chunk predicts of the prompt.

    A sequence that was preempted computes its prompt from the start again: what it had found gives way.
    """
    assert len(found) == min(chunk.stop, len(sequence.prompt_ids) - 1) - chunk.start
    sequence.prompt_logprobs[chunk.start :] = found


def collect_routing(sequence: Sequence, found: Iterable[RouterChoice], stop: int) -> None:
    """Keep for the next output what routers chose for a chunk that ends before ``stop``, each token once.

    A sequence that was preempted computes tokens again whose routing has been told, and a choice that does not report
    the prompt's may have to compute the end of it.
    """
    for choice in found:
        told = max(0, sequence.num_routed - choice.start)
        if told:
            choice = msgspec.structs.replace(
                choice, start=choice.start + told, experts=choice.experts[told:], weights=choice.weights[told:]
            )
        if choice.experts:
            sequence.routing.append(choice)
    sequence.num_routed = max(sequence.num_routed, stop)
