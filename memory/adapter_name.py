"""What may be the name of an adapter. Imports nothing: every process that hears names applies this one rule."""

from __future__ import annotations

MAX_NAME_LENGTH = 255


def name_problem(name: str) -> str | None:
    """What keeps a text from being the name of an adapter; None if nothing does."""
    if not name or len(name) > MAX_NAME_LENGTH:
        return f"a name has 1 to {MAX_NAME_LENGTH} characters"
    if name.startswith(".") or name != name.strip():
        return "a name starts with no dot, and starts and ends with no space"
    if not name.isprintable() or any(character in name for character in ",/\\"):
        return "a name holds no commas, slashes, backslashes or control characters"
    return None
