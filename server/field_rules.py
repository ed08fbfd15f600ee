"""Request fields that are known but not modelled: refused unless harmless, or accepted without effect.

Everything else that a body holds is unknown: accepted and named in a response header, or refused when the server is
strict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraplex.server.errors import InvalidRequestError

NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "modalities": (None, [], ["text"]),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
"""Field -> the values that ask for nothing. Any other value is a 400."""

WITHOUT_EFFECT = frozenset(
    {
        "adapter_source",
        "api_token",
        "moderation",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "spaces_between_special_tokens",
    }
)
"""Fields that promise nothing we would break, accepted silently."""

MAX_NAMES = 32
MAX_NAME_LENGTH = 64


def refuse_unserved(extra: Mapping[str, Any]) -> None:
    """Refuses fields that would change the answer and are not served.

    Raises:
        InvalidRequestError: with code ``unsupported_parameter`` and the field's name.
    """
    for name, value in extra.items():
        harmless = NOT_SERVED.get(name)
        if harmless is not None and value not in harmless:
            accepted = " or ".join(repr(choice) for choice in harmless if choice is not None)
            raise InvalidRequestError(
                f"'{name}' is not served; leave it out" + (f", or send {accepted}." if accepted else "."),
                param=name,
                code="unsupported_parameter",
            )


def unknown_fields(extra: Iterable[str], *, strict: bool) -> list[str]:
    """Names of the fields that have no effect because nobody knows them, safe for a header.

    Raises:
        InvalidRequestError: there is one and the server is strict.
    """
    names = [name for name in extra if name not in NOT_SERVED and name not in WITHOUT_EFFECT]
    if names and strict:
        shown = printable(names[0])
        raise InvalidRequestError(f"'{shown}' is not a known field.", param=shown, code="unknown_parameter")
    return [printable(name) for name in names[:MAX_NAMES]]


def printable(name: str) -> str:
    """A client's field name cut down to what may stand in a header."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "?" for letter in name)
    return kept[:MAX_NAME_LENGTH] or "?"
