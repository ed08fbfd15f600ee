"""Options of a generation, and the fields of the body that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

AdapterId = str | Mapping[str, float] | Sequence[tuple[str, float]]
"""An adapter's name, or a mix: adapters with their weights, as ``{"a": 0.7, "b": 0.3}`` or as pairs."""


class GenerationOptions(TypedDict, total=False):
    """What ``chat`` and ``generate`` take by name. None is as good as absent: the server's default holds.

    Attributes:
        max_tokens: most tokens of each choice.
        temperature: 0 is greedy.
        top_p: keep the likeliest tokens that make up this much of the probability.
        top_k: keep this many of the likeliest tokens.
        min_p: keep tokens at least this likely, relative to the likeliest.
        stop: texts that end a choice; they are not part of it.
        seed: makes sampling repeatable.
        n: choices per prompt.
        logprobs: tell the log-probability of each token and of this many alternatives to it; 0 is no alternative.
        presence_penalty: taken off the logit of every token that the choice holds already.
        frequency_penalty: likewise, once per occurrence.
        repetition_penalty: divides the likelihood of tokens of the prompt and the choice.
        logit_bias: added to the logits of tokens, by their ids.
        ignore_eos: go on to ``max_tokens`` whatever the model says.
        min_tokens: fewest tokens before a choice may end.
        return_routing: tell which experts the routers of the adapter chose for each token.
        cache_salt: only requests of the same salt begin with what the server has kept of each other's prompts.
        extra: further fields of the body, as they are; they win over all others.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    n: int | None
    logprobs: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    ignore_eos: bool | None
    min_tokens: int | None
    return_routing: bool | None
    cache_salt: str | None
    extra: Mapping[str, Any] | None


class CompletionOptions(GenerationOptions, total=False):
    """What ``generate`` takes by name: all of ``GenerationOptions``, and ``echo``: begin the text with the prompt."""

    echo: bool | None


def completion_body(
    prompt: str | Sequence[int], adapter_id: AdapterId | None, options: CompletionOptions
) -> dict[str, Any]:
    """Body of ``POST /v1/completions``; TypeError for an option that there is not."""
    fields = _fields(options, CompletionOptions)
    fields["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    return fields | _adapter(adapter_id) | dict(options.get("extra") or {})


def chat_body(
    messages: Sequence[Mapping[str, Any]], adapter_id: AdapterId | None, options: GenerationOptions
) -> dict[str, Any]:
    """Body of ``POST /v1/chat/completions``; TypeError for an option that there is not."""
    fields = _fields(options, GenerationOptions)
    if "logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    fields["messages"] = [dict(message) for message in messages]
    return fields | _adapter(adapter_id) | dict(options.get("extra") or {})


def _adapter(adapter_id: AdapterId | None) -> dict[str, Any]:
    if adapter_id is None or isinstance(adapter_id, str):
        return {} if adapter_id is None else {"adapter_id": adapter_id}
    parts = adapter_id.items() if isinstance(adapter_id, Mapping) else adapter_id
    return {"adapter_id": {"adapters": [{"id": name, "weight": weight} for name, weight in parts]}}


def _fields(options: Mapping[str, Any], accepted: type[Any]) -> dict[str, Any]:
    known = accepted.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; accepted are {', '.join(sorted(known))}")
    fields = {name: value for name, value in options.items() if value is not None and name != "extra"}
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    if "stop" in fields and not isinstance(fields["stop"], str):
        fields["stop"] = list(fields["stop"])
    return fields
