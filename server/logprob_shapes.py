"""Log-probabilities as the two APIs write them. Natural logarithms; nothing is below -9999."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraplex.server.choice_text import LogprobEntry
from loraplex.server.vocabulary import Vocabulary

LEAST_LOGPROB = -9999.0


def chat_logprobs(entries: Sequence[LogprobEntry], vocabulary: Vocabulary) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion."""
    return {"content": [_chat_entry(entry, vocabulary) for entry in entries], "refusal": None}


def _chat_entry(entry: LogprobEntry, vocabulary: Vocabulary) -> dict[str, Any]:
    logprob = entry.logprob.logprob if entry.logprob else 0.0
    top = entry.logprob.top if entry.logprob else []
    return _chat_token(entry.token_id, logprob, vocabulary) | {
        "top_logprobs": [_chat_token(token_id, best, vocabulary) for token_id, best in top]
    }


def _chat_token(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "token": vocabulary.text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(vocabulary.bytes_of.get(token_id, b"")),
    }


def completion_logprobs(entries: Sequence[LogprobEntry], vocabulary: Vocabulary) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion. ``top_logprobs`` always holds the chosen token too."""
    return {
        "tokens": [vocabulary.distinct_text(entry.token_id) for entry in entries],
        "token_logprobs": [_finite(entry.logprob.logprob) if entry.logprob else None for entry in entries],
        "top_logprobs": [_completion_top(entry, vocabulary) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _completion_top(entry: LogprobEntry, vocabulary: Vocabulary) -> dict[str, float] | None:
    """Token text -> log-probability, best first. Of tokens with the same text the better one is named."""
    if entry.logprob is None:
        return None
    named: dict[str, float] = {}
    for token_id, logprob in [*entry.logprob.top, (entry.token_id, entry.logprob.logprob)]:
        named.setdefault(vocabulary.distinct_text(token_id), _finite(logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB
