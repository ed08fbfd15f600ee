"""The settings as a JSON Schema, for files of settings that are checked before a server reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic.fields import FieldInfo

from loraplex.server.settings import Settings

_NULL = {"type": "null"}
_BYTES = {
    "type": ["string", "integer"],
    "pattern": r"^\s*[0-9]*\.?[0-9]+\s*([KkMmGgTtPpEe]?[Ii]?[Bb]?)?\s*$",
    "minimum": 1,
}
_KEPT = frozenset(
    {"type", "enum", "items", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    | {"additionalProperties", "minItems", "maxItems", "minLength", "maxLength"}
)


def settings_schema(without: Collection[str] = ()) -> dict[str, Any]:
    """A schema (draft 7) of the settings, each of which may be left out or null.

    Args:
        without: settings that the file may not hold.
    """
    made = Settings.model_json_schema()
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"description": field.description, **_optional(_kinds(made, name, field))}
            for name, field in Settings.model_fields.items()
            if name not in without
        },
    }


def secret_settings() -> frozenset[str]:
    """Settings that hold secrets, and so have no place in a file that others may read."""
    return frozenset(name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation))


def _kinds(made: dict[str, Any], name: str, field: FieldInfo) -> list[dict[str, Any]]:
    """What a setting may be beside null."""
    if "ByteSize" in str(field.annotation):
        return [_BYTES]
    told = made["properties"][name]
    kinds = [kind for kind in told.get("anyOf", [told]) if kind != _NULL]
    return [_plain(made["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind) for kind in kinds]


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without what says nothing of the values that it takes."""
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in schema.items() if key in _KEPT}


def _optional(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    if len(kinds) > 1:
        return {"anyOf": [*kinds, _NULL]}
    (kind,) = kinds
    types = kind["type"]
    optional = kind | {"type": [*([types] if isinstance(types, str) else types), "null"]}
    return optional | ({"enum": [*kind["enum"], None]} if "enum" in kind else {})
