"""Chat completions as they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.server.answer import FinishedChoice
from loraplex.server.choice_text import Delta, LogprobEntry
from loraplex.server.logprob_shapes import chat_logprobs
from loraplex.server.routing_runs import routing_runs
from loraplex.server.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """First the role, then the text token by token, then an empty delta with the finish reason."""

    vocabulary: Vocabulary
    with_logprobs: bool
    with_routing: bool = False
    body_kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def body_choice(self, index: int, choice: FinishedChoice) -> dict[str, Any]:
        written = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.entries),
            "finish_reason": choice.finish_reason,
        }
        return written | {"routing": routing_runs(choice.routing)} if self.with_routing else written

    def chunk_choices(self, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        opening = [_chunk(delta.index, {"role": "assistant", "content": ""})] if first else []
        chunks = []
        if delta.text or delta.entries or delta.finish_reason is None:
            chunks.append(_chunk(delta.index, {"content": delta.text}, self._logprobs(delta.entries)))
        if delta.finish_reason is not None:
            chunks.append(_chunk(delta.index, {}, finish_reason=delta.finish_reason))
        if delta.routing:
            chunks[0]["routing"] = routing_runs(delta.routing)
        return opening + chunks

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self.vocabulary) if self.with_logprobs else None


def _chunk(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
