"""What the answers of both APIs have in common: their head, their choices, their chunks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraplex.server.adapter_choice import AdapterChoice
from loraplex.server.choice_text import Delta, Finish, LogprobEntry
from loraplex.server.generation import Generation
from loraplex.server.generation_job import Target
from loraplex.server.messages import EngineInfo, RouterChoice
from loraplex.server.schemas import GenerationRequest
from loraplex.server.sse import event


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every body and chunk of an answer repeats."""

    id: str
    model: str
    fingerprint: str
    service_tier: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The head as fields; ``kind`` is the ``object``."""
        head = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return head if self.service_tier is None else head | {"service_tier": self.service_tier}


@dataclass(slots=True)
class FinishedChoice:
    """A choice in full."""

    text: str = ""
    entries: list[LogprobEntry] = field(default_factory=list)
    finish_reason: Finish | None = None
    routing: list[RouterChoice] = field(default_factory=list)


class AnswerShape(Protocol):
    """How one API writes answers."""

    def body_choice(self, index: int, choice: FinishedChoice) -> dict[str, Any]:
        """One of the ``choices`` of a whole answer."""
        ...

    def chunk_choices(self, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        """The choices of the chunks that tell of a delta, a chunk each. ``first``: the choice was not heard of yet."""
        ...

    @property
    def body_kind(self) -> str: ...

    @property
    def chunk_kind(self) -> str: ...


@dataclass(frozen=True, slots=True)
class UsageChunks:
    """Which chunks of a stream carry ``usage``."""

    at_end: bool = False
    always: bool = False


def fingerprint(info: EngineInfo, chosen: AdapterChoice) -> str:
    """``system_fingerprint``: changes with the base model, its dtype, and the adapters' registrations and weights."""
    parts = [info.model_path, info.architecture, info.dtype, info.device]
    for part in chosen.parts:
        parts += [part.adapter.name, part.adapter.path, str(part.adapter.revision), repr(part.weight)]
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def head_of(body: GenerationRequest, answer_id: str, base_name: str, target: Target) -> AnswerHead:
    """The head of an answer. ``model`` is what the client asked for; where it lists adapters, the base's name."""
    asked = body.model or (body.named_adapter if isinstance(body.named_adapter, str) else None)
    return AnswerHead(
        id=answer_id,
        model=asked or base_name,
        fingerprint=fingerprint(target.info, target.chosen),
        service_tier="default" if body.service_tier is not None else None,
    )


async def whole_answer(generation: Generation, head: AnswerHead, shape: AnswerShape) -> dict[str, Any]:
    """The answer in one body."""
    choices = [FinishedChoice() for _ in range(generation.job.num_choices)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choice = choices[delta.index]
            choice.text += delta.text
            choice.entries += delta.entries
            choice.finish_reason = delta.finish_reason
            choice.routing += delta.routing
    return head.of_kind(shape.body_kind) | {
        "choices": [shape.body_choice(index, choice) for index, choice in enumerate(choices)],
        "usage": generation.usage,
        "metrics": generation.timing.report(generation.completion_tokens),
    }


async def streamed_answer(
    generation: Generation, head: AnswerHead, shape: AnswerShape, usage: UsageChunks
) -> AsyncGenerator[bytes, None]:
    """The answer as events, without the last ``[DONE]``."""
    fields = head.of_kind(shape.chunk_kind)
    if usage.at_end:
        fields["usage"] = None
    heard: set[int] = set()
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            for choice in shape.chunk_choices(delta, first=delta.index not in heard):
                chunk = fields | {"choices": [choice]}
                if usage.always:
                    chunk["usage"] = generation.usage
                yield event(chunk)
            heard.add(delta.index)
    if usage.at_end:
        metrics = generation.timing.report(generation.completion_tokens)
        yield event(fields | {"choices": [], "usage": generation.usage, "metrics": metrics})
