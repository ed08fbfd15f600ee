"""Writes what is made from the chart's values: their schema, and a table of them.

``values_schema.py schema`` prints loraplex/values.schema.json, ``values_schema.py table`` docs/helm-values.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loraplex.server.settings_schema import secret_settings, settings_schema

HERE = Path(__file__).resolve().parent
CHART = HERE / "loraplex"
OTHERWISE = {
    "model": "model.*",
    "served_model_name": "model.name",
    "adapters": "adapterFolder.*",
    "adapter": "adapters",
    "watch": "adapterFolder.watch",
    "state_dir": "state.*",
    "cache_dir": "cache.*",
    "port": "containerPort",
    "api_keys": "auth.secretKey",
    "tenant_keys": "auth.tenantsKey",
    "metrics_compat": "metricsCompat",
}
"""Settings that the chart makes from other values."""
_HEAD = """# Values of the Helm chart

Made by `make docs` from `deploy/helm/`. Unknown values are refused. How to use them: [kubernetes.md](kubernetes.md).

| value | default | what it does |
| --- | --- | --- |
"""


def values_schema() -> dict[str, Any]:
    """The schema of all values (draft 7, which every Helm understands)."""
    schema: dict[str, Any] = yaml.safe_load((HERE / "values.schema.yaml").read_text(encoding="utf-8"))
    said = ", ".join(f"`{name}` ({value})" for name, value in OTHERWISE.items())
    settings = settings_schema(without=OTHERWISE.keys() | secret_settings())
    settings["description"] = f"Any setting of [settings.md](settings.md) but those that other values make: {said}."
    schema["properties"]["config"] = settings
    return schema


def values_table() -> str:
    """The page as Markdown."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = values_schema()
    return _HEAD + "".join(_rows(schema["properties"], defaults, schema["definitions"], ""))


def _rows(
    properties: dict[str, Any], defaults: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> Iterator[str]:
    for name, schema in properties.items():
        path = prefix + name
        told = definitions.get(schema.get("$ref", "").rpartition("/")[2], {}) | schema
        if "description" in told:
            yield f"| `{path}` | {_shown(defaults.get(name))} | {told['description']} |\n"
        else:
            yield from _rows(told["properties"], defaults[name], definitions, path + ".")


def _shown(default: Any) -> str:
    empty = default in (None, "", [], {}) or (isinstance(default, dict) and not any(default.values()))
    return "" if empty else f"`{json.dumps(default) if not isinstance(default, str) else default}`"


if __name__ == "__main__":
    made = {"schema": lambda: json.dumps(values_schema(), indent=1) + "\n", "table": values_table}
    sys.stdout.write(made[sys.argv[1]]())
