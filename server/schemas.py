"""Bodies of the requests, and the ranges of their fields. Every field may be null, which is as good as absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
)
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
INT64_MAX = 2**63 - 1
MAX_WEIGHT = 100.0
MAX_SALT_LENGTH = 256
NAME_FORM, MIX_FORM = "adapter:name", "adapter:mix"
"""Tags of the two forms of ``adapter_id``; pydantic puts them into the path of a fault."""

Prompt = str | list[int]


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _one_or_more_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _fault("Input should be a string or a list of strings")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise _fault(f"Stop strings should have 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}


def _one_or_more_prompts(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(one, str) for one in value) or all(map(_is_ids, value))):
        return value
    raise _fault("Input should be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _bias_by_id(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(key.isascii() and key.isdecimal() and len(key) < 20 for key in value):
        raise _fault("Input should be a map of token ids, written as strings, to numbers from -100 to 100")
    return {int(key): bias for key, bias in value.items()}


def _text_of_parts(value: Any) -> Any:
    """Content parts as one text, a line each; a text or null stays as it is."""
    return "\n".join(map(_text_of_part, value)) if isinstance(value, list) else value


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if isinstance(part, dict) and kind in {"text", "refusal"} else None
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in {"text", "refusal"}:
        raise PydanticCustomError(
            "unsupported_parameter", "Content parts of type '{kind}' are not served; accepted is 'text'", {"kind": kind}
        )
    raise _fault('A content part should be {"type": "text", "text": "..."}')


class RequestModel(BaseModel):
    """Base of all bodies: no conversions between types, no NaN; fields not listed are kept in ``model_extra``."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @property
    def extra(self) -> dict[str, Any]:
        return self.model_extra or {}


class StreamOptions(RequestModel):
    """``include_obfuscation`` is accepted and has no effect."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


AdapterName = Annotated[str, StringConstraints(min_length=1)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


class MixPart(RequestModel, extra="forbid"):
    """One adapter of a mix. ``weight`` is 1 if absent; it may be negative."""

    id: AdapterName
    weight: Weight | None = None


class AdapterMix(RequestModel, extra="forbid"):
    """``adapter_id`` as a weighted list: what each adapter changes is added up, times its weight."""

    adapters: Annotated[list[MixPart], Field(min_length=1)]


class MergedAdapters(RequestModel, extra="forbid"):
    """LoRAX's ``merged_adapters``.

    ``linear`` is a mix. The others are merged once: ``density`` is the share of values that they keep.
    ``weights`` are 1 if absent or empty. ``majority_sign_method`` is for ``ties`` and ``dare_ties``.
    """

    ids: Annotated[list[AdapterName], Field(min_length=1)]
    weights: list[Weight] | None = None
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


def _form_of(value: Any) -> str:
    return MIX_FORM if isinstance(value, dict | AdapterMix) else NAME_FORM


def _name_or_mix(value: Any) -> Any:
    if isinstance(value, str):
        return value
    raise _fault('Input should be an adapter\'s name, or {"adapters": [{"id": "...", "weight": 1.0}]}')


AdapterId = Annotated[
    Annotated[str, BeforeValidator(_name_or_mix), Tag(NAME_FORM)] | Annotated[AdapterMix, Tag(MIX_FORM)],
    Discriminator(_form_of),
]


class GenerationRequest(RequestModel):
    """What completions and chat completions have in common. ``lora_path`` is SGLang's name for ``adapter_id``."""

    model: str | None = None
    adapter_id: AdapterId | None = None
    lora_path: AdapterName | None = None
    merged_adapters: MergedAdapters | None = None
    return_routing: bool | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=MAX_SALT_LENGTH)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_bias_by_id)] = (
        None
    )
    stop: Annotated[
        Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None, BeforeValidator(_one_or_more_stops)
    ] = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_STRINGS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None

    user: str | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None

    @property
    def named_adapter(self) -> str | AdapterMix | None:
        """What ``adapter_id`` or its other name ask for; falsy for what ``model`` says."""
        return self.adapter_id or self.lora_path


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[Prompt], BeforeValidator(_one_or_more_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


class ToolCallFunction(RequestModel):
    """The function that an earlier answer called; ``arguments`` is JSON."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call in an earlier answer, given back as history."""

    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChatMessage(RequestModel):
    """One message. ``content`` is a text, or a list of text parts, which are joined by line breaks."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_text_of_parts)] = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def _has_content(message: ChatMessage) -> ChatMessage:
    if message.content is None and message.role != "assistant":
        raise _fault(f"A message of role '{message.role}' should have a 'content' that is a text or a list of parts")
    return message


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Annotated[ChatMessage, AfterValidator(_has_content)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    chat_template_kwargs: dict[str, JsonValue] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, JsonValue]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class LoadLoraRequest(RequestModel):
    """Body of ``POST /v1/load_lora_adapter``, and of SGLang's ``/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None


class UnloadLoraRequest(RequestModel):
    """Body of ``POST /v1/unload_lora_adapter``, and of SGLang's ``/unload_lora_adapter``."""

    lora_name: str


class SageMakerAdapterRequest(RequestModel):
    """Body of ``POST /adapters``."""

    name: str
    src: str


class RegisterAdapterRequest(RequestModel, extra="forbid"):
    """Body of ``POST /v1/adapters``. ``replace`` registers a name that stands for another path, too."""

    id: str
    path: str
    pinned: bool | None = None
    tags: list[str] | None = None
    replace: bool | None = None


class ChangeAdapterRequest(RequestModel, extra="forbid"):
    """Body of ``PATCH /v1/adapters/{id}``. ``path`` moves the name to another content in place."""

    path: str | None = None
    pinned: bool | None = None
    tags: list[str] | None = None


class PrefetchAdapterRequest(RequestModel, extra="forbid"):
    """Body of ``POST /v1/adapters/{id}/prefetch``; ``tier`` is the pool if absent."""

    tier: Literal["host", "pool"] | None = None
