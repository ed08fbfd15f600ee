"""A prompt repeated at the beginning of its completions, with its log-probabilities where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.server.choice_text import LogprobEntry
from loraplex.server.detokenizer import Detokenizer
from loraplex.server.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt's text, and one entry per prompt token or none."""

    text: str
    entries: tuple[LogprobEntry, ...]


def echo_of(
    ids: Sequence[int],
    sent: str | None,
    logprobs: Sequence[TokenLogprob | None] | None,
    detokenizer: Detokenizer,
) -> PromptEcho:
    """The echo of a prompt.

    Args:
        ids: the prompt's tokens.
        sent: the prompt as text, if it came as text; it is repeated to the letter.
        logprobs: the engine's scores, None for the first token.
        detokenizer: a fresh one.
    """
    offsets, pieces, length = [], [], 0
    for token_id in ids:
        offsets.append(length)
        pieces.append(detokenizer.push(token_id))
        length += len(pieces[-1])
    text = "".join([*pieces, detokenizer.finish()]) if sent is None else sent
    entries = (
        LogprobEntry(token_id, min(offset, len(text)), logprob)
        for token_id, offset, logprob in zip(ids, offsets, logprobs or (), strict=False)
    )
    return PromptEcho(text, tuple(entries))
