"""One choice's tokens become its text: detokenized, cut at stop strings, with the log-probabilities that go along.

A log-probability entry goes out with the first character of its token's text; an entry without text of its own goes
out as soon as nothing is held back before it. When a stop string matches, tokens whose text starts at or behind the cut
lose their entries (with ``keep_stop`` the cut lies behind the stop string). Tokens are counted all the same, and the
choices of routers are told for all of them: they were computed. An end-of-sequence or stop token keeps its entry,
though not its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from loraplex.server.detokenizer import Detokenizer
from loraplex.server.generation_job import TextOptions
from loraplex.server.messages import RouterChoice, TokenLogprob, TokenOutput
from loraplex.server.stop_strings import StopScanner

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """A token with its log-probability, and where in the choice's text its own text starts.

    ``logprob`` is None for the first token of an echoed prompt.
    """

    token_id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(slots=True)
class Delta:
    """What a choice gained: text, entries and routing where asked for, and its end.

    ``num_tokens`` are those it stands for.
    """

    index: int
    text: str = ""
    entries: list[LogprobEntry] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: Finish | None = None
    routing: list[RouterChoice] = field(default_factory=list)


class ChoiceText:
    """The text of one choice. Ends with the engine's finish reason or with a stop string, whichever comes first.

    Args:
        index: the choice's number in the answer.
        prefix: an echoed prompt: text that goes before the choice's own, and its entries.
    """

    def __init__(self, index: int, detokenizer: Detokenizer, options: TextOptions, prefix: Delta | None = None) -> None:
        self.index = index
        self._detokenizer = detokenizer
        self._options = options
        self._scanner = StopScanner(options.stop) if options.stop else None
        self._delta = prefix if prefix is not None else Delta(index)
        self._released = self._read = len(self._delta.text)
        self._waiting: list[LogprobEntry] = []
        self._sent_any = False
        self.num_tokens = 0
        self.finish_reason: Finish | None = None

    def accept(self, output: TokenOutput) -> Delta | None:
        """Takes new tokens; returns a delta when one is due."""
        self._delta.routing += output.routing or []
        last = len(output.token_ids) - 1
        for at, token_id in enumerate(output.token_ids):
            hidden = at == last and output.finish_reason == "stop" and not self._options.keep_stop
            self._take(token_id, output.logprobs[at] if output.logprobs else None, hidden=hidden)
            if self.finish_reason:
                return self._flush()
        if output.finish_reason:
            self._end("length" if output.finish_reason == "length" else "stop")
            return self._flush()
        return self._flush() if self._due else None

    @property
    def ended(self) -> bool:
        """Whether nothing more will be accepted."""
        return self.finish_reason is not None

    @property
    def stopped_early(self) -> bool:
        """Whether a stop string ended the choice, so that the engine must be told."""
        return self._scanner is not None and self._scanner.matched > 0

    @property
    def _due(self) -> bool:
        return not self._sent_any or self._delta.num_tokens >= self._options.interval

    def _take(self, token_id: int, logprob: TokenLogprob | None, *, hidden: bool) -> None:
        self.num_tokens += 1
        self._delta.num_tokens += 1
        if logprob is not None:
            self._waiting.append(LogprobEntry(token_id, self._read, logprob))
        self._add_text("" if hidden else self._detokenizer.push(token_id))

    def _add_text(self, text: str) -> None:
        self._read += len(text)
        if self._scanner is not None:
            text = self._scanner.feed(text, armed=self.num_tokens > self._options.min_tokens)
        self._release(text)
        if self.stopped_early:
            self._cut()
        elif self._waiting:
            self._release_entries(settled=self._released == self._read and not self._detokenizer.pending)

    def _release(self, text: str) -> None:
        self._released += len(text)
        self._delta.text += text

    def _release_entries(self, *, settled: bool) -> None:
        """Moves entries whose text has begun to go out, or all of them when nothing is held back."""
        out = [entry for entry in self._waiting if settled or entry.offset < self._released]
        self._waiting = self._waiting[len(out) :]
        self._delta.entries += out

    def _cut(self) -> None:
        """A stop string matched: takes back what has not gone out of it."""
        self.finish_reason = "stop"
        if self._scanner is not None and not self._options.keep_stop:
            self._delta.text = self._delta.text[: -self._scanner.matched]
            self._released -= self._scanner.matched
        self._release_entries(settled=False)
        self._waiting = []

    def _end(self, reason: Finish) -> None:
        """The engine ended the choice: what was held back goes out."""
        self._add_text(self._detokenizer.finish())
        if self.finish_reason is None:
            self.finish_reason = reason
            self._release(self._scanner.finish() if self._scanner is not None else "")
            self._release_entries(settled=True)

    def _flush(self) -> Delta:
        delta, self._delta = self._delta, Delta(self.index)
        delta.finish_reason = self.finish_reason
        self._sent_any = True
        return delta
