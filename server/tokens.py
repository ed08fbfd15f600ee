"""The tokenizer of the served model: text to ids, messages to ids, and ids back to text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplex.server.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from loraplex.server.errors import InvalidRequestError
from loraplex.server.vocabulary import vocabulary_of


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How messages become a prompt. ``template_kwargs`` go to the chat template as they are."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class TextTokenizer:
    """Encodes and decodes. Safe to use from several threads at once: nothing in it changes after the start."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = _frozen_backend(tokenizer)
        self.vocabulary = vocabulary_of(self._backend)
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("The text holds lone surrogates; it must be valid Unicode.") from error

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The chat template's text for some messages.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions with a prompt.", param="messages"
            )
        self._check_template_kwargs(options.template_kwargs)
        return self._apply_template([dict(message) for message in messages], options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        """Token ids of some messages. The template writes its own special tokens, so none are added by default."""
        return self.encode(self.render_chat(messages, options), add_special_tokens=options.add_special_tokens)

    def detokenizer(self, *, skip_special: bool = True, at_start: bool = True) -> Detokenizer:
        """A fresh text in the making; see ``ByteDetokenizer`` for the arguments."""
        if self.vocabulary.exact:
            return ByteDetokenizer(self.vocabulary, skip_special=skip_special, at_start=at_start)
        return WindowDetokenizer(lambda ids: str(self._backend.decode(ids, skip_special_tokens=skip_special)))

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some ids, as the concatenation of a detokenizer's pieces."""
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])

    def _check_template_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        for name in kwargs:
            if name in self._reserved or name == "messages":
                raise InvalidRequestError(
                    f"'{name}' cannot be set through chat_template_kwargs; accepted are variables of the model's own"
                    " chat template.",
                    param="chat_template_kwargs",
                )

    def _apply_template(self, messages: list[dict[str, Any]], options: ChatOptions) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                documents=options.documents,
                **options.template_kwargs,
            )
        except Exception as error:  # a template is a program fed by the client: whatever it raises is about its input
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {error}", param="messages"
            ) from error
        return str(text)


def load_tokenizer(model_path: str | Path) -> TextTokenizer:
    """The tokenizer of a checkpoint folder or hub id; InvalidRequestError where there is none or a broken one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_path))
    except Exception as error:  # the tokenizers package knows no class for a broken file
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"the tokenizer in {model_path} cannot be read: {reason}", param="model") from error
    return TextTokenizer(tokenizer)


def _frozen_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's Rust half, with truncation and padding off, so that encoding changes no state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidRequestError(
            f"{type(tokenizer).__name__} has no tokenizer.json form; a checkpoint with a fast tokenizer is needed."
        )
    backend.no_truncation()
    backend.no_padding()
    return backend
