"""Runs a job: the engine's outputs become deltas of choices, counted and timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from loraplex.server.choice_text import ChoiceText, Delta, Finish
from loraplex.server.echo import PromptEcho, echo_of
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import EngineError, LoraplexError
from loraplex.server.generation_job import Job
from loraplex.server.messages import Generate, TokenOutput
from loraplex.server.metrics import ServerMetrics
from loraplex.server.request_timing import Failure, RequestTiming
from loraplex.server.slo_hints import NO_HINTS, SloHints
from loraplex.server.tenant_metrics import TenantCounts
from loraplex.server.tokens import TextTokenizer

Numbered = tuple[int, TokenOutput]


class Generation:
    """One job on its way. ``deltas`` may be iterated once; the counts grow while it is.

    Closing ``deltas`` early aborts what the engine still works on.

    Attributes:
        outcome: ``finished``, ``failed``, or ``aborted`` until it is known better.
        finish_reasons: of the choices that are over, in that order.
    """

    def __init__(
        self,
        job: Job,
        engine: EngineClient,
        tokenizer: TextTokenizer,
        metrics: ServerMetrics,
        timing: RequestTiming,
        tenant: TenantCounts,
        hints: SloHints = NO_HINTS,
    ) -> None:
        self.job = job
        self.timing = timing
        self.hints = hints
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.outcome = "aborted"
        self.finish_reasons: list[Finish] = []
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._tenant = tenant
        self._choices: dict[int, ChoiceText] = {}
        self._echoes: dict[int, PromptEcho] = {}
        self._num_finished = 0

    @property
    def kind(self) -> str:
        """Label of the metrics: whether an adapter was used."""
        return "adapter" if self.job.uses_adapters else "base"

    @property
    def usage(self) -> dict[str, object]:
        """The ``usage`` object, as of now."""
        prompt, completion = self.job.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the choices gain, in the order it comes; every choice ends with a delta that has a finish reason.

        Raises:
            LoraplexError: the engine failed the request.
        """
        self.timing.sent = time.monotonic()
        self._metrics.add_prompt_tokens(self.kind, self.job.prompt_tokens)
        self._tenant.request_began(self.job.prompt_tokens)
        try:
            async with aclosing(self._outputs()) as outputs:
                async for at, output in outputs:
                    if (delta := self._accept(at, output)) is not None:
                        yield delta
            self._check_complete()
            self.outcome = "finished"
        except LoraplexError:
            self.outcome = "failed"
            raise
        finally:
            self.timing.ended = time.monotonic()
            self._metrics.request_ended(self.kind, self.outcome, self.timing.elapsed)
            self._tenant.request_ended(self.cached_tokens, had_tokens=self.timing.first_token is not None)
            self._metrics.slo.count(self.hints, self.timing, self.outcome)

    async def _outputs(self) -> AsyncGenerator[Numbered, None]:
        """The outputs of all commands, each with its command's number."""
        sources = [self._command_outputs(at, command) for at, command in enumerate(self.job.commands)]
        async with aclosing(sources[0] if len(sources) == 1 else _interleaved(sources)) as outputs:
            async for numbered in outputs:
                yield numbered

    async def _command_outputs(self, at: int, command: Generate) -> AsyncGenerator[Numbered, None]:
        """One command's outputs. Where its prompt is scored, choice 0 comes first: it brings the scores for all."""
        waiting: list[TokenOutput] = []
        scored = command.params.prompt_logprobs is None
        try:
            async with aclosing(self._engine.generate(command)) as outputs:
                async for output in outputs:
                    if not scored and output.index != 0:
                        waiting.append(output)
                        continue
                    yield at, output
                    scored = True
                    while waiting:
                        yield at, waiting.pop(0)
        except LoraplexError as error:
            if error.times is not None:
                self.timing.failed = Failure(at, error.times)
            raise

    def _accept(self, at: int, output: TokenOutput) -> Delta | None:
        choice = self._choice(at, output)
        if choice.ended:
            return None
        if output.began is not None:
            self.timing.began(at, output)
        if output.finish_reason == "abort":
            raise EngineError("The engine ended the request before it was finished.")
        before = choice.num_tokens
        delta = choice.accept(output)
        self._observe(choice.index, output, choice.num_tokens - before)
        if delta is not None and delta.finish_reason is not None:
            self.timing.prompt(at).choice_over(output.over)
            self._finish(delta.finish_reason, self.job.commands[at].request_id, output)
        return delta

    def _choice(self, at: int, output: TokenOutput) -> ChoiceText:
        index = at * self.job.n + output.index
        return self._choices.get(index) or self._new_choice(index, at, output)

    def _new_choice(self, index: int, at: int, output: TokenOutput) -> ChoiceText:
        options = self.job.text
        self.cached_tokens += output.cached_tokens if output.index == 0 else 0
        detokenizer = self._tokenizer.detokenizer(skip_special=options.skip_special, at_start=options.at_start)
        choice = ChoiceText(index, detokenizer, options, self._prefix(index, at, output))
        self._choices[index] = choice
        return choice

    def _prefix(self, index: int, at: int, output: TokenOutput) -> Delta:
        """The beginning of a choice: nothing, or the echoed prompt."""
        if self.job.echoes is None:
            return Delta(index)
        if at not in self._echoes:
            ids = self.job.commands[at].prompt_ids
            detokenizer = self._tokenizer.detokenizer(skip_special=self.job.text.skip_special)
            self._echoes[at] = echo_of(ids, self.job.echoes[at], output.prompt_logprobs, detokenizer)
        echo = self._echoes[at]
        return Delta(index, text=echo.text, entries=list(echo.entries))

    def _observe(self, index: int, output: TokenOutput, num_tokens: int) -> None:
        self.completion_tokens += num_tokens
        first, gap = self.timing.token_came(index)
        if first:
            self.timing.queue_seconds = output.queue_seconds
            self.timing.adapter_load_seconds = output.adapter_load_seconds
            self._metrics.first_token(self.kind, self.timing.time_to_first_token, output.queue_seconds)
            self._tenant.first_token_came(self.timing.time_to_first_token)
        self._metrics.tokens_came(self.kind, num_tokens, gap)
        self._tenant.generated += num_tokens

    def _finish(self, reason: Finish, request_id: str, output: TokenOutput) -> None:
        self._num_finished += 1
        self.finish_reasons.append(reason)
        self._metrics.choice_finished(self.kind, reason)
        if output.finish_reason is None:
            self._engine.abort_choice(request_id, output.index)

    def _check_complete(self) -> None:
        if self._num_finished < self.job.num_choices:
            raise EngineError("The engine ended the request before all its choices were finished.")


async def _interleaved(sources: Sequence[AsyncGenerator[Numbered, None]]) -> AsyncGenerator[Numbered, None]:
    """Items of all sources as they come. The first failure ends them all."""
    queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    open_sources = len(tasks)
    try:
        while open_sources:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_sources -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[Numbered, None], queue: asyncio.Queue[Numbered | Exception | None]) -> None:
    """Moves items to the queue; None says that the source is over."""
    try:
        async with aclosing(source):
            async for item in source:
                queue.put_nowait(item)
        queue.put_nowait(None)
    except Exception as error:  # handed on to the reader of the queue
        queue.put_nowait(error)
