"""What each token id stands for, as bytes.

Most tokenizers decode by joining the bytes of their tokens: the byte-level ones (Llama 3, Qwen, GPT-2) and the
SentencePiece ones with byte fallback (Llama 2, Mistral). For these the vocabulary is ``exact``. For any other decoder
the bytes are those of the token decoded alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Bytes of every token, and which tokens are special.

    Args:
        bytes_of: token id -> bytes. Ids that the tokenizer does not know stand for nothing.
        special: ids that ``skip_special_tokens`` hides.
        exact: whether a text's bytes are the concatenation of its tokens' bytes.
        strips_first_space: whether one space at the start of a text is dropped.
    """

    bytes_of: dict[int, bytes]
    special: frozenset[int] = field(default_factory=frozenset)
    exact: bool = True
    strips_first_space: bool = False

    def text(self, token_id: int) -> str:
        """The token as text, with U+FFFD for what is no whole character."""
        return self.bytes_of.get(token_id, b"").decode("utf-8", "replace")

    def distinct_text(self, token_id: int) -> str:
        """The token as text, or ``bytes:\\xf0\\x9f`` where it is no whole character, so that names differ."""
        raw = self.bytes_of.get(token_id, b"")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Reads the vocabulary of a ``tokenizers`` tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    steps = _decoder_steps(tokenizer)
    to_bytes = _bytes_function(steps)
    names = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    if to_bytes is None:
        table = {token_id: _decoded_alone(tokenizer, token_id) for token_id in names}
    else:
        table = {token_id: to_bytes(name) for token_id, name in names.items()}
    return Vocabulary(
        bytes_of=table,
        special=frozenset(token_id for token_id, token in added.items() if token.special),
        exact=to_bytes is not None,
        strips_first_space=_strips_first_space(steps),
    )


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [dict(step) for step in steps]


def _bytes_function(steps: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_function()
    if not kinds or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replacements = [pair for step in steps if (pair := _replacement(step)) is not None]
    if any(step["type"] == "Replace" and "String" not in step["pattern"] for step in steps):
        return None
    return _fallback_function(replacements, byte_fallback="ByteFallback" in kinds)


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace":
        return step["pattern"].get("String", ""), step["content"]
    return None


def _byte_level_function() -> Callable[[str], bytes]:
    letters = _byte_level_letters()

    def to_bytes(name: str) -> bytes:
        try:
            return bytes([letters[letter] for letter in name])
        except KeyError:
            return name.encode("utf-8", "replace")

    return to_bytes


def _byte_level_letters() -> dict[str, int]:
    """Letter -> byte: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _fallback_function(replacements: list[tuple[str, str]], *, byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(name: str) -> bytes:
        if byte_fallback and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            name = name.replace(old, new)
        return name.encode("utf-8", "replace")

    return to_bytes


def _strips_first_space(steps: list[dict[str, Any]]) -> bool:
    for step in steps:
        if step["type"] == "Strip" and step["content"] == " " and step["start"] > 0:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme") != "never":
            return True
    return False


def _decoded_alone(tokenizer: Tokenizer, token_id: int) -> bytes:
    return str(tokenizer.decode([token_id], skip_special_tokens=False)).encode("utf-8", "replace")
