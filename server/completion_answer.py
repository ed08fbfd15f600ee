"""Completions as they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.server.answer import FinishedChoice
from loraplex.server.choice_text import Delta, LogprobEntry
from loraplex.server.logprob_shapes import completion_logprobs
from loraplex.server.routing_runs import routing_runs
from loraplex.server.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape:
    """One chunk per delta; the last one of a choice carries its finish reason."""

    vocabulary: Vocabulary
    with_logprobs: bool
    with_routing: bool = False
    body_kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def body_choice(self, index: int, choice: FinishedChoice) -> dict[str, Any]:
        written = self._choice(index, choice.text, choice.entries, choice.finish_reason)
        return written | {"routing": routing_runs(choice.routing)} if self.with_routing else written

    def chunk_choices(self, delta: Delta, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002 the role is chat's
        written = self._choice(delta.index, delta.text, delta.entries, delta.finish_reason)
        return [written | {"routing": routing_runs(delta.routing)} if delta.routing else written]

    def _choice(
        self, index: int, text: str, entries: Sequence[LogprobEntry], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = completion_logprobs(entries, self.vocabulary) if self.with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
