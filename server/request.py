"""Requests as the scheduler sees them: one prompt, and a sequence of tokens for each of its choices."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from loraplex.memory.prefix_cache import PageChain
from loraplex.server.messages import AdapterRef, FinishReason, Generate, RouterChoice, SamplingParams, TokenLogprob
from loraplex.server.span_times import AdapterLoad

NEVER: Final = 2**31 - 1
"""A position behind any token: an adapter that starts here does not act at all."""

USUAL_PATIENCE: Final = 2.0
"""Seconds to the first token of a request that does not say what it hopes for. Also what the most urgent one can gain
on others: nobody who is silent comes in behind those who came more than that later."""

LONGEST_PATIENCE: Final = 60.0
"""Seconds; who can wait for longer still comes in after that."""


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


TRANSITIONS: Final[Mapping[SequenceState, frozenset[SequenceState]]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}
"""Allowed changes of state. A running sequence waits again when it is preempted."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: the prompt, and what has been generated.

    Attributes:
        seq_id: unique, and rising with arrival: a lower one came earlier.
        request: that it belongs to.
        index: which choice.
        seed: of its random draws, 0 to 2**63 - 1.
        prompt_ids: shared by the choices of a request; never written.
        output_ids: tokens sampled so far; grown by ``append`` only.
        num_computed: leading tokens whose K/V is in the pool, or will be after the step in flight.
        state: see ``TRANSITIONS``; changed by ``enter`` only.
        cached_tokens: tokens whose K/V was in the pool already at the first admission.
        first_scheduled_at: monotonic seconds of the first admission.
        adapter_load_seconds: how long the first admission waited for the adapter; None for the base model.
        output_counts: how often each token was sampled; kept only where a penalty is on.
        prompt_logprobs: collected so far for the prompt tokens from the second on.
        has_output: whether its first output has been sent.
        routing: what routers chose for its tokens, collected since its last output.
        num_routed: leading tokens whose routing is collected or sent, or not asked of this choice.
        pinned: identities of the adapters that it pins.
        chain: names of its pages in the prefix cache; None while it is not known, or where it is not used.
        num_cached_pages: leading full pages that it has from the prefix cache or has given to it, if it uses it.
        passed: later sequences admitted while this one was first in line and found no pages.
        holds_adapters: whether it holds its adapters in the host store, because it waits for pages for them.
        num_pending: 1 while the step in flight samples a token for it whose id is not known yet, else 0.
        num_tokens: the prompt's tokens, the sampled ones and the pending one; kept by ``expect`` and ``append``, as
            every step asks for it.
        preempted_at: monotonic seconds of each time that it was preempted.
    """

    seq_id: int
    request: Request = field(repr=False)
    index: int
    seed: int
    prompt_ids: list[int] = field(repr=False)
    output_ids: list[int] = field(default_factory=list, repr=False)
    num_computed: int = 0
    state: SequenceState = SequenceState.WAITING
    cached_tokens: int = 0
    first_scheduled_at: float | None = None
    adapter_load_seconds: float | None = None
    output_counts: Counter[int] | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)
    has_output: bool = False
    routing: list[RouterChoice] = field(default_factory=list, repr=False)
    num_routed: int = 0
    pinned: tuple[str, ...] = ()
    chain: PageChain | None = field(default=None, repr=False)
    num_cached_pages: int = 0
    passed: int = 0
    holds_adapters: bool = False
    num_pending: int = 0
    num_tokens: int = field(init=False)
    preempted_at: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its last token is still to be computed."""
        return self.num_computed < self.num_tokens - 1

    @property
    def has_prompt_computed(self) -> bool:
        """Whether the K/V of the whole prompt is in the pool."""
        return self.num_computed >= len(self.prompt_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far, the pending one included: the position of the next draw."""
        return len(self.output_ids) + self.num_pending

    @property
    def needs_history(self) -> bool:
        """Whether the ids of all sampled tokens must be known before the next one can be computed: under penalties, and
        with adapters that choose experts by token id."""
        return self.output_counts is not None or self.request.routes_by_token

    @property
    def ends_with_pending(self) -> bool:
        """Whether the pending token, whatever it is, is its last: there is nothing to compute behind it."""
        return self.num_pending > 0 and self.num_tokens >= self.request.max_total_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the log-probabilities of its prompt are asked for and not sent yet."""
        return not self.has_output and self.index == 0 and self.request.params.prompt_logprobs is not None

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose K/V may come from the prefix cache: of the others something is wanted of the model."""
        if self.wants_prompt_logprobs:
            return 0
        last = self.num_tokens - 1
        return min(last, self.num_routed) if self.request.return_routing else last

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Known tokens ``start`` to ``stop - 1``, counted from the start of the prompt."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[: stop - num_prompt]

    def enter(self, state: SequenceState) -> None:
        """Change state. AssertionError for a change that ``TRANSITIONS`` does not list."""
        assert state in TRANSITIONS[self.state], f"sequence {self.seq_id}: {self.state.value} -> {state.value}"
        self.state = state

    def expect(self) -> None:
        """Count a token that the step in flight samples. There is one at most, and none where ``needs_history``."""
        assert not self.num_pending, f"sequence {self.seq_id} has a pending token already"
        assert not self.needs_history, f"sequence {self.seq_id} cannot go on before its last token is known"
        self.num_pending = 1
        self.num_tokens += 1

    def append(self, token_id: int) -> None:
        """Add a sampled token; it is the pending one, where there is one."""
        self.output_ids.append(token_id)
        if self.num_pending:
            self.num_pending = 0
        else:
            self.num_tokens += 1
        if self.output_counts is not None:
            self.output_counts[token_id] += 1

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is over after its latest token, or None while it goes on. No token is pending."""
        num_outputs = len(self.output_ids)
        params = self.request.params
        if num_outputs and num_outputs >= params.min_tokens and self.output_ids[-1] in self.request.stop_ids:
            return "stop"
        if num_outputs >= params.max_tokens or self.num_tokens >= self.request.max_total_tokens:
            return "length"
        return None


@dataclass(frozen=True, slots=True)
class AdapterPages:
    """An adapter that is needed in the pool; for the fields with defaults see ``AdapterReady``."""

    identity: str
    ref: AdapterRef
    num_pages: int
    routes_by_token: bool = False
    changes_kv: bool = True
    kind: str = ""
    num_bytes: int = 0


@dataclass(slots=True)
class CopyTimes:
    """When an adapter was copied into the pool, in monotonic seconds; ``ended`` is None until it has arrived."""

    started: float
    ended: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One prompt under one adapter or a mix of them, or under none, with one sequence for each choice.

    Attributes:
        request_id: as the client of the engine named it.
        params: how to sample.
        weights: of the adapters asked for; empty for the base model.
        prompt_ids: at least one.
        arrival: monotonic seconds.
        due: likewise, when its first token is hoped for; who waits comes in by that.
        max_total_tokens: prompt and output together; reaching it ends a choice.
        stop_ids: tokens that end a choice.
        return_routing: whether to report the experts that routers choose.
        cache_salt: only requests of the same one share K/V.
        sequences: by choice.
        held_back: sequences that wait for the prompt of choice 0, to share it.
        adapters: identities with their weights, by identity; None until all were found ready.
        adapter_start: first position on which they act; ``NEVER`` for an activated adapter that was not invoked.
        images: what they take in the pool, once they were found ready.
        first_lookup_at: monotonic seconds at which the adapters were first asked for.
        waited_for_adapter: whether an adapter was ever found loading.
        num_live: sequences that are not finished.
        origin: what logs call it.
        loads: what brought its adapters to the host since it arrived, by identity.
        copies: what brought them into the pool when it was let in first, by identity.
        failed_adapter: name of the one that could not be loaded, which was its end.
        has_begun: whether its first output has been sent.
    """

    request_id: str
    params: SamplingParams
    weights: Mapping[AdapterRef, float]
    prompt_ids: list[int] = field(repr=False)
    arrival: float
    due: float
    max_total_tokens: int
    stop_ids: frozenset[int] = field(repr=False)
    return_routing: bool = False
    cache_salt: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    held_back: list[Sequence] = field(default_factory=list, repr=False)
    adapters: tuple[tuple[str, float], ...] | None = None
    adapter_start: int = 0
    images: tuple[AdapterPages, ...] = ()
    first_lookup_at: float | None = None
    waited_for_adapter: bool = False
    num_live: int = 0
    origin: str = ""
    loads: dict[str, tuple[AdapterLoad, ...]] = field(default_factory=dict, repr=False)
    copies: dict[str, CopyTimes] = field(default_factory=dict, repr=False)
    failed_adapter: str | None = None
    has_begun: bool = False

    @property
    def is_mix(self) -> bool:
        """Whether anything but one adapter as it stands is asked for."""
        return len(self.weights) > 1 or any(weight != 1.0 for weight in self.weights.values())

    @property
    def num_adapter_pages(self) -> int:
        """Pages that its adapters take in the pool."""
        return sum(image.num_pages for image in self.images)

    @property
    def routes_by_token(self) -> bool:
        """Whether an adapter chooses experts by the ids of tokens."""
        return any(image.routes_by_token for image in self.images)

    @property
    def content(self) -> str:
        """What K/V depends on beside the tokens: the content and weights of adapters that change it; else ""."""
        neutral = {image.identity for image in self.images if not image.changes_kv}
        changing = tuple(one for one in self.adapters or () if one[0] not in neutral)
        return repr(changing) if changing else ""


def make_request(
    generate: Generate, *, first_seq_id: int, arrival: float, max_total_tokens: int, eos_token_ids: frozenset[int]
) -> Request:
    """Build a request and its sequences, all waiting, with ids from ``first_seq_id`` on."""
    params = generate.params
    weights = _weights(generate)
    request = Request(
        request_id=generate.request_id,
        params=params,
        weights=weights,
        prompt_ids=generate.prompt_ids,
        arrival=arrival,
        due=arrival + _patience(generate.first_token_within),
        max_total_tokens=max_total_tokens,
        stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids),
        return_routing=generate.return_routing,
        cache_salt=generate.cache_salt,
        adapters=None if weights else (),
        origin=generate.origin,
    )
    seed = params.seed if params.seed is not None else secrets.randbits(64)
    counted = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
    request.sequences = [
        Sequence(
            seq_id=first_seq_id + index,
            request=request,
            index=index,
            seed=choice_seed(seed, index),
            prompt_ids=request.prompt_ids,
            output_counts=Counter() if counted else None,
            # The prompt's routing is choice 0's to report.
            num_routed=len(request.prompt_ids) if index else 0,
        )
        for index in range(generate.n)
    ]
    request.held_back = request.sequences[1:]
    request.num_live = generate.n
    return request


def _patience(hoped_for: float | None) -> float:
    return USUAL_PATIENCE if hoped_for is None else min(hoped_for, LONGEST_PATIENCE)


def _weights(generate: Generate) -> dict[AdapterRef, float]:
    """The adapters asked for; one that a mix names twice counts once, with the sum of its weights."""
    assert not (generate.adapter and generate.mix), "an adapter beside a mix"
    if generate.adapter is not None:
        return {generate.adapter: 1.0}
    weights: dict[AdapterRef, float] = {}
    for part in generate.mix:
        weights[part.adapter] = weights.get(part.adapter, 0.0) + part.weight
    return weights


def invocation_start(prompt_ids: list[int], invocation: tuple[int, ...]) -> int:
    """Where an activated adapter begins to act: at the last occurrence of its tokens in the prompt, or ``NEVER``.

    That is PEFT's rule for ``alora_invocation_tokens``. Without such tokens an adapter acts from the start.
    """
    if not invocation:
        return 0
    tokens, length = list(invocation), len(invocation)
    for start in range(len(prompt_ids) - length, -1, -1):
        if prompt_ids[start] == tokens[0] and prompt_ids[start : start + length] == tokens:
            return start
    return NEVER


def choice_seed(seed: int, index: int) -> int:
    """The seed of one choice, 0 to 2**63 - 1: neighbouring seeds and choices have nothing in common."""
    return _splitmix64(_splitmix64(seed) + index) >> 1


def _splitmix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
