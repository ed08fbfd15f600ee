"""The whole engine at work, without HTTP: requests in, steps, tokens out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from harness import Harness
from timing import synchronize

from loraplex.server.messages import Abort, AdapterRef, Event, Generate, OutputBatch, SamplingParams


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    adapter: int
    prompt: int
    output: int


@dataclass(slots=True)
class Tally:
    """What came out.

    Attributes:
        seconds: from the first request to the last token, or to where the run was cut.
        requests: that ended.
        adapters: names of the adapters of requests that had a token.
    """

    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    steps: int = 0
    was_cut: bool = False
    adapters: set[str] = field(default_factory=set)


def random_prompt(harness: Harness, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    prompt: list[int] = torch.randint(3, harness.shape.vocabulary, (length,), generator=generator).tolist()
    return prompt


def _generate(harness: Harness, name: str, prompt: list[int], output: int, ref: AdapterRef | None) -> None:
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    harness.engine.handle(Generate(request_id=name, prompt_ids=prompt, params=params, adapter=ref))


def _check(events: Sequence[Event]) -> list[OutputBatch]:
    """The outputs among events; RuntimeError where a request failed."""
    batches = [event for event in events if isinstance(event, OutputBatch)]
    for batch in batches:
        if batch.failed:
            raise RuntimeError(f"a request failed: {batch.failed[0].error.message}")
    return batches


class DecodeRun:
    """Requests under way, all of them past their prompt.

    Args:
        refs: the adapter of each.
        context: tokens of each prompt.
        name: of the run; request ids begin with it.
    """

    def __init__(self, harness: Harness, refs: Sequence[AdapterRef | None], context: int, name: str) -> None:
        self._harness = harness
        self._ids = [f"{name}-{index}" for index in range(len(refs))]
        room = harness.shape.max_positions - context - 1
        for index, (request_id, ref) in enumerate(zip(self._ids, refs)):
            _generate(harness, request_id, random_prompt(harness, context, index), room, ref)
        started: set[str] = set()
        while len(started) < len(refs):
            for batch in _check(harness.engine.step()):
                started |= {output.request_id for output in batch.outputs}

    def seconds_per_step(self, steps: int, warmup: int = 3) -> float:
        """Wall seconds of a step, over so many of them, all that the engine does included."""
        for _ in range(warmup):
            _check(self._harness.engine.step())
        synchronize(self._harness.device)
        started = time.perf_counter()
        for _ in range(steps):
            _check(self._harness.engine.step())
        synchronize(self._harness.device)
        return (time.perf_counter() - started) / steps

    def close(self) -> None:
        """End the requests."""
        for request_id in self._ids:
            self._harness.engine.handle(Abort(request_id=request_id))
        while self._harness.engine.has_work:
            self._harness.engine.step()


def first_token_seconds(harness: Harness, ref: AdapterRef | None, prompt: list[int], name: str) -> float:
    """From a request's arrival at the idle engine to its first token."""
    synchronize(harness.device)
    started = time.perf_counter()
    _generate(harness, name, prompt, 1, ref)
    while not any(batch.outputs for batch in _check(harness.engine.step())):
        pass
    took = time.perf_counter() - started
    while harness.engine.has_work:
        harness.engine.step()
    return took


def run_trace(harness: Harness, refs: Sequence[AdapterRef], trace: Sequence[TraceRequest], limit: float) -> Tally:
    """Send a whole trace at once and serve it to its end, or for so many seconds. A request's adapter is taken modulo
    the number of adapters."""
    tally = Tally()
    name_of = {}
    for index, one in enumerate(trace):
        ref = refs[one.adapter % len(refs)]
        name_of[str(index)] = ref.name
        _generate(harness, str(index), random_prompt(harness, one.prompt, index), one.output, ref)
    synchronize(harness.device)
    started = time.perf_counter()
    while harness.engine.has_work:
        for batch in _check(harness.engine.step()):
            for output in batch.outputs:
                tally.tokens += len(output.token_ids)
                tally.adapters.add(name_of[output.request_id])
                tally.requests += output.finish_reason is not None
        tally.steps += 1
        if time.perf_counter() - started > limit:
            tally.was_cut = True
            break
    synchronize(harness.device)
    tally.seconds = time.perf_counter() - started
    if tally.was_cut:
        for name in name_of:
            harness.engine.handle(Abort(request_id=name))
        while harness.engine.has_work:
            harness.engine.step()
    return tally
