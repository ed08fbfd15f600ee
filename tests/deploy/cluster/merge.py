"""Values on top of values."""

from __future__ import annotations

from typing import Any


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges values: maps key by key, everything else as a whole."""
    result = dict(below)
    for key, value in above.items():
        old = below.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
