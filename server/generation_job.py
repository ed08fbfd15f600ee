"""A checked body becomes work for the engine: token ids within the context, sampling parameters within their ranges."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from loraplex.server.adapter_choice import AdapterChoice
from loraplex.server.errors import ContextLengthError, InvalidRequestError
from loraplex.server.http_config import HttpConfig
from loraplex.server.messages import EngineInfo, Generate, SamplingParams
from loraplex.server.schemas import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest, Prompt
from loraplex.server.stop_strings import StopPatterns
from loraplex.server.tokens import ChatOptions, TextTokenizer

DEFAULT_COMPLETION_TOKENS = 16
INLINE_CHARACTERS = 16_384
LEAST_TOP_P = 1e-6
UNSTREAMED_INTERVAL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How the tokens of a choice become its text.

    Args:
        stop: stop strings, or None.
        keep_stop: leave the stop string or stop token in the text.
        skip_special: leave special tokens out of the text.
        at_start: whether the choice's text starts a text (chat), or continues one (completions).
        interval: tokens per delta; the first one never waits.
        min_tokens: stop strings that are complete within so many tokens are let through.
    """

    stop: StopPatterns | None = None
    keep_stop: bool = False
    skip_special: bool = True
    at_start: bool = True
    interval: int = 1
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request's work: a command per prompt. Choices are numbered prompt by prompt, ``n`` for each.

    ``echoes`` holds each prompt's text where it is to be repeated before the choices' own: the text as it was sent, or
    None where it was sent as token ids.
    """

    commands: tuple[Generate, ...]
    text: TextOptions
    n: int
    echoes: tuple[str | None, ...] | None = None

    def asked_for(self, origin: str, first_token_within: float | None) -> Job:
        """The same job, whose commands carry what logs call the request, and its hope for the first token."""
        commands = tuple(
            msgspec.structs.replace(command, origin=origin, first_token_within=first_token_within)
            for command in self.commands
        )
        return replace(self, commands=commands)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(command.prompt_ids) for command in self.commands)

    @property
    def num_choices(self) -> int:
        return self.n * len(self.commands)

    @property
    def uses_adapters(self) -> bool:
        return self.commands[0].adapter is not None or bool(self.commands[0].mix)

    @property
    def wants_logprobs(self) -> bool:
        return self.commands[0].params.logprobs is not None

    @property
    def wants_routing(self) -> bool:
        return self.commands[0].return_routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a job runs on: the engine, and the adapters of its request."""

    info: EngineInfo
    chosen: AdapterChoice

    def room_for(self, num_prompt: int, wanted: int | None, param: str) -> int:
        """How many tokens may follow a prompt: what was wanted, cut to the context and to the pool.

        Raises:
            ContextLengthError: the prompt and one new token exceed the context, or need more pages than there are.
        """
        info = self.info
        needed = num_prompt + (1 if wanted is None else min(wanted, 1))
        if needed > info.max_model_len:
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens; with the tokens to generate that exceeds the context of"
                f" {info.max_model_len} tokens.",
                param=param,
            )
        pages = info.num_pages - self.chosen.pages
        if (needed_pages := -(-needed // info.page_tokens)) > pages:
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens, which need {needed_pages} pages; the pool has {info.num_pages},"
                f" of which the adapter takes {self.chosen.pages}.",
                param=param,
            )
        room = min(info.max_model_len, pages * info.page_tokens) - num_prompt
        return room if wanted is None else min(wanted, room)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMaker:
    """Makes the jobs of one server."""

    config: HttpConfig
    tokenizer: TextTokenizer

    async def chat(self, body: ChatCompletionRequest, job_id: str, target: Target) -> Job:
        """The job of a chat completion."""
        logprobs = self._chat_logprobs(body)
        self._check_limits(body, target.info)
        ids = await self._encode_messages(body)
        if not ids:
            raise InvalidRequestError("The messages have no token at all.", param="messages")
        _check_ids(ids, target.info.vocab_size, "messages")
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        params = sampling_params(body, wanted, logprobs=logprobs)
        return self._job(body, [ids], params, wanted, job_id, target)

    async def completion(self, body: CompletionRequest, job_id: str, target: Target) -> Job:
        """The job of a completion: a command per prompt."""
        self._check_limits(body, target.info)
        self._check_completion(body)
        prompts = [await self._encode_prompt(prompt, body, target.info) for prompt in body.prompt]
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        params = sampling_params(
            body, wanted, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None
        )
        job = self._job(body, prompts, params, wanted, job_id, target)
        return _echoing(job, body.prompt) if body.echo else job

    def _job(
        self,
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        wanted: int | None,
        job_id: str,
        target: Target,
    ) -> Job:
        chat = isinstance(body, ChatCompletionRequest)
        n = body.n or 1

        def command(at: int, prompt_ids: list[int]) -> Generate:
            room = target.room_for(len(prompt_ids), wanted, "messages" if chat else "prompt")
            return Generate(
                request_id=f"{job_id}-{at}",
                prompt_ids=prompt_ids,
                params=msgspec.structs.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room)),
                adapter=target.chosen.adapter,
                mix=target.chosen.mix,
                n=n,
                return_routing=bool(body.return_routing),
                cache_salt=body.cache_salt or "",
            )

        commands = tuple(command(at, prompt_ids) for at, prompt_ids in enumerate(prompts))
        if body.return_routing:
            _check_routing(commands, self.config.max_routing_tokens)
        return Job(commands=commands, text=self._text_options(body, at_start=chat), n=n)

    def _text_options(self, body: GenerationRequest, *, at_start: bool) -> TextOptions:
        return TextOptions(
            stop=StopPatterns(body.stop) if body.stop else None,
            keep_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            at_start=at_start,
            interval=self.config.stream_interval if body.stream else UNSTREAMED_INTERVAL,
            min_tokens=body.min_tokens or 0,
        )

    def _check_limits(self, body: GenerationRequest, info: EngineInfo) -> None:
        _check_at_most(body.n, self.config.max_n, "n")
        _check_ids(body.logit_bias or (), info.vocab_size, "logit_bias")
        _check_ids(body.stop_token_ids or (), info.vocab_size, "stop_token_ids")

    def _check_completion(self, body: CompletionRequest) -> None:
        _check_at_most(body.logprobs, self.config.max_logprobs, "logprobs")
        if (choices := len(body.prompt) * (body.n or 1)) > self.config.max_choices:
            raise InvalidRequestError(
                f"'prompt' and 'n' ask for {choices} choices; accepted are at most {self.config.max_choices}.",
                param="prompt",
            )
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequestError(
                f"'best_of' is {body.best_of}; only the value of 'n' is served, here {body.n or 1}.",
                param="best_of",
                code="unsupported_parameter",
            )

    def _chat_logprobs(self, body: ChatCompletionRequest) -> int | None:
        _check_at_most(body.top_logprobs, self.config.max_logprobs, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None

    async def _encode_prompt(self, prompt: Prompt, body: CompletionRequest, info: EngineInfo) -> list[int]:
        ids = prompt if isinstance(prompt, list) else await self._encode_text(prompt, body)
        if not ids:
            raise InvalidRequestError("'prompt' is empty; it must have at least one token.", param="prompt")
        _check_ids(ids, info.vocab_size, "prompt")
        return ids

    async def _encode_text(self, text: str, body: CompletionRequest) -> list[int]:
        special = body.add_special_tokens is not False
        return await _off_loop(len(text), lambda: self.tokenizer.encode(text, add_special_tokens=special))

    async def _encode_messages(self, body: ChatCompletionRequest) -> list[int]:
        options = _chat_options(body)
        messages = [_template_message(message) for message in body.messages]
        size = sum(len(message.content or "") for message in body.messages)
        return await _off_loop(size, lambda: self.tokenizer.encode_chat(messages, options))


def sampling_params(
    body: GenerationRequest, wanted: int | None, *, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The parameters of a body, with what is absent at its default. ``max_tokens`` is still without a limit."""
    if wanted is not None and (body.min_tokens or 0) > wanted:
        raise InvalidRequestError(
            f"'min_tokens' is {body.min_tokens}, more than the {wanted} tokens to generate.", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=wanted or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=max(_or(body.top_p, 1.0), LEAST_TOP_P),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _echoing(job: Job, prompts: Sequence[Prompt]) -> Job:
    echoes = tuple(prompt if isinstance(prompt, str) else None for prompt in prompts)
    return Job(commands=job.commands, text=job.text, n=job.n, echoes=echoes)


def _check_at_most(value: int | None, limit: int, param: str) -> None:
    if value is not None and value > limit:
        raise InvalidRequestError(f"'{param}' is {value}; accepted are values up to {limit}.", param=param)


def _check_routing(commands: Sequence[Generate], limit: int) -> None:
    """Refuses an answer that would tell the routes of too many tokens: it could be megabytes for each hundred."""
    tokens = sum(len(command.prompt_ids) + command.n * command.params.max_tokens for command in commands)
    if tokens > limit:
        raise InvalidRequestError(
            f"'return_routing' would cover up to {tokens} tokens, of prompts and choices; accepted are at most {limit}:"
            " ask for fewer with 'max_tokens'.",
            param="return_routing",
        )


def _check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    for token_id in (min(ids), max(ids)) if ids else ():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"'{param}' holds the token id {token_id}; this model's ids are 0 to {vocab_size - 1}.", param=param
            )


def _chat_options(body: ChatCompletionRequest) -> ChatOptions:
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.", param="continue_final_message"
        )
    if goes_on and body.messages[-1].role != "assistant":
        raise InvalidRequestError(
            "'continue_final_message' needs a last message of role 'assistant'.", param="continue_final_message"
        )
    return ChatOptions(
        add_generation_prompt=not goes_on and body.add_generation_prompt is not False,
        continue_final_message=goes_on,
        add_special_tokens=bool(body.add_special_tokens),
        documents=body.documents,
        template_kwargs=_template_kwargs(body),
    )


def _template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    named = {"reasoning_effort": body.reasoning_effort, "verbosity": body.verbosity}
    return {name: value for name, value in named.items() if value is not None} | dict(body.chat_template_kwargs or {})


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates know it: ``developer`` is ``system``, and call arguments are objects."""
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.content or ""}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": _template_function(call.function.name, call.function.arguments),
            }
            for call in message.tool_calls
        ]
    return rendered


def _template_function(name: str, arguments: str) -> dict[str, Any]:
    """A call of an earlier answer; arguments that are no JSON object stay the text that they are."""
    try:
        return {"name": name, "arguments": msgspec.json.decode(arguments, type=dict[str, Any])}
    except (msgspec.DecodeError, RecursionError):
        return {"name": name, "arguments": arguments}


async def _off_loop(size: int, encode: Callable[[], list[int]]) -> list[int]:
    """Encodes a long text in a thread, so that it delays nobody else's tokens."""
    return encode() if size < INLINE_CHARACTERS else await asyncio.to_thread(encode)
