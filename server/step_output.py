"""What a client is told of one step of one choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from loraplex.server.errors import LoraplexError
from loraplex.server.messages import (
    ErrorInfo,
    FinishReason,
    RequestFailed,
    RouterChoice,
    TokenLogprob,
    TokenOutput,
)
from loraplex.server.request import Request, Sequence
from loraplex.server.span_times import AdapterLoad, AdapterUse, BeginTimes, EndTimes, FailTimes
from loraplex.server.step_plan import Chunk, SampledToken


def make_output(
    sequence: Sequence, result: SampledToken | None, reason: FinishReason | None, clock: Callable[[], float]
) -> TokenOutput:
    """The output of a sequence, and what routers chose since the last one.

    Times, cached tokens and the prompt's log-probabilities come with the first one. ``clock`` tells monotonic seconds.
    """
    request = sequence.request
    token_ids = [] if result is None else [result.token_id]
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = [] if result is None or result.logprob is None else [result.logprob]
    routing = None
    if request.return_routing:
        routing, sequence.routing = sequence.routing, []
    over = None if reason is None else EndTimes(clock(), sequence.preempted_at)
    if sequence.has_output:
        return TokenOutput(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            routing=routing,
            over=over,
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
        began=_begin_times(sequence, clock()),
        over=over,
    )


def _begin_times(sequence: Sequence, now: float) -> BeginTimes | None:
    """What the first output of a request tells."""
    request = sequence.request
    if request.has_begun:
        return None
    request.has_begun = True
    assert sequence.first_scheduled_at is not None
    uses = [
        AdapterUse(image.ref.name, image.identity, image.kind, _loads(request, image.identity, image.num_bytes))
        for image in request.images
    ]
    return BeginTimes(request.arrival, sequence.first_scheduled_at, now, uses)


def _loads(request: Request, identity: str, num_bytes: int) -> list[AdapterLoad]:
    loads = list(request.loads.get(identity, ()))
    copy = request.copies.get(identity)
    if copy is not None:
        loads.append(AdapterLoad("host", "pool", copy.started, copy.ended, num_bytes))
    return loads


def request_failed(request: Request, error: LoraplexError, now: float) -> RequestFailed:
    """What the client of a request that has failed is told, and when it came and what it waited for in vain."""
    times = FailTimes(request.arrival, now, request.failed_adapter, request.first_lookup_at)
    info = ErrorInfo.of(error)
    return RequestFailed(request_id=request.request_id, error=info, times=times, origin=request.origin)


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
