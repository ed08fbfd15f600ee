"""What a client is told of one step of one choice."""

from __future__ import annotations

from loraplex.server.messages import FinishReason, TokenOutput
from loraplex.server.request import Sequence
from loraplex.server.step_plan import SampledToken


def make_output(sequence: Sequence, result: SampledToken | None, reason: FinishReason | None) -> TokenOutput:
    """The output of a sequence; times, cached tokens and the prompt's log-probabilities come with the first one."""
    request = sequence.request
    token_ids = [] if result is None else [result.token_id]
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = [] if result is None or result.logprob is None else [result.logprob]
    if sequence.has_output:
        return TokenOutput(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
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
    )
