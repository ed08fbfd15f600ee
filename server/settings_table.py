"""The table of all settings, made from the settings: ``python -m loraplex.server.settings_table`` prints it."""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo

from loraplex.server.settings import PREFIX, Settings

_HEAD = """# Settings

Made by `make docs` from `server/settings.py`. Every setting of `loraplex serve` is a flag (`--pool-bytes 8GiB`), an
environment variable (`LORAPLEX_POOL_BYTES=8GiB`) and a key of the YAML or TOML file that `--config` names
(`pool_bytes: 8GiB`); flags win over the environment, the environment over the file. Unknown names and bad values stop
the start.

| setting | accepts | default | what it does |
| --- | --- | --- | --- |
"""
_NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", ByteSize: "bytes, e.g. 512MiB"}


def settings_table() -> str:
    """The page as Markdown."""
    rows = [
        f"| `{name}` | {_accepted(field)} | {_default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return _HEAD + "\n".join(rows) + f"\n\nEnvironment variables start with `{PREFIX}`.\n"


def _accepted(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(field)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return "list, separated by commas"
    if origin in (types.UnionType, typing.Union):
        return _type_name(next(part for part in arguments if part is not types.NoneType))
    if annotation is SecretStr:
        return "text"
    return _NAMES.get(annotation, "path")


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": "&gt;", "ge": "&ge;", "lt": "&lt;", "le": "&le;"}
    found = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, ByteSize):
        return f"`{field.default.human_readable()}`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    sys.stdout.write(settings_table())
