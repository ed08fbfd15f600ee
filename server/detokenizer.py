"""Token ids to text, one token at a time, never half a character.

The text of all pieces together is what decoding all ids at once gives (without ``clean_up_tokenization_spaces``).
The one exception: where byte-fallback tokens form no valid UTF-8, ``tokenizers`` gives one U+FFFD for each byte of the
run, and here valid characters of the run survive.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from loraplex.server.vocabulary import Vocabulary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """One text in the making. ``push`` returns the characters that a token completes."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str:
        """The text is over: returns U+FFFD for what is left of a character, or nothing."""
        ...

    @property
    def pending(self) -> bool:
        """Whether a character is half read."""
        ...


class ByteDetokenizer:
    """For vocabularies whose texts are the concatenation of their tokens' bytes. Constant time per token.

    Args:
        skip_special: leave special tokens out.
        at_start: whether the text starts here, so that a tokenizer's dummy first space goes; a continuation keeps it.
    """

    __slots__ = ("_bytes_of", "_decoder", "_hidden", "_strip")

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = True, at_start: bool = True) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._hidden = vocabulary.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and vocabulary.strips_first_space

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        text = self._decoder.decode(self._bytes_of.get(token_id, b""))
        return self._stripped(text) if self._strip and text else text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def _stripped(self, text: str) -> str:
        self._strip = False
        return text.removeprefix(" ")


class WindowDetokenizer:
    """For any other decoder: decodes a short window again with every token, and sends what the window gained.

    The window starts at the last place where a whole text was sent, so its length is that of a character or a word.
    """

    __slots__ = ("_decode", "_ids", "_limit", "_sent")

    def __init__(self, decode: Callable[[list[int]], str], *, limit: int = 16) -> None:
        self._decode = decode
        self._limit = limit
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token_id: int) -> str:
        before = len(self._ids)
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and before - self._sent < self._limit:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._decode(self._ids)) if self.pending else ""

    @property
    def pending(self) -> bool:
        return self._sent < len(self._ids)

    def _advance(self, text: str) -> str:
        gained = text[len(self._decode(self._ids[: self._sent])) :]
        self._ids = self._ids[self._sent :]
        self._sent = len(self._ids)
        return gained
