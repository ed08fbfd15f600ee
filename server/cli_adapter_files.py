"""The work of ``loraplex adapters inspect`` and ``verify``: adapter folders, read without a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, find_adapters, identity_of
from loraplex.memory.tensor_file import list_tensor_file
from loraplex.server.cli_base import CliBase, implied_base, open_base
from loraplex.server.cli_report import fail, print_error, print_line, table_console

_A_HALF = re.compile(r"\.lora_(?:embedding_)?A\b")
_EXPERT = re.compile(r"\.layers\.([0-9]+)\.(?:.*\.)?experts\.([0-9]+)\.")

_EXPERTS_ONLY = frozenset({"num_experts", "top_k", "routing", "scope"})


def inspect(path: Path, base: Path | None, *, allow_bin: bool, page_tokens: int, dtype: str, as_json: bool) -> None:
    """Print what an adapter folder holds, and what it takes on a base where one is given."""
    try:
        facts = _facts(path)
        if base is not None:
            facts |= _facts_on(open_base(base, dtype), path, allow_bin, page_tokens)
    except AdapterFileError as error:
        fail(reason(error))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def verify(paths: Sequence[Path], base: Path | None, *, allow_bin: bool, page_tokens: int, dtype: str) -> None:
    """Read adapters in full, against a base where one is given: a line for each, exit code 1 if one is refused."""
    opened = None if base is None else open_base(base, dtype)
    console = Console()
    count = num_bad = 0
    for folder in _adapter_folders(paths):
        count += 1
        try:
            _verify_one(folder, opened, allow_bin, page_tokens, console)
        except AdapterFileError as error:
            num_bad += 1
            print_error(f"{folder}: {reason(error)}")
    if count > 1:
        end = "be served on some base" if base is None else f"be served on {base}"
        console.print(f"{count - num_bad} of {count} adapters can {end}", soft_wrap=True, markup=False)
    if num_bad:
        raise typer.Exit(1)


def reason(error: AdapterFileError) -> str:
    """What was wrong, with the key at fault."""
    named = error.key is None or error.key in error.message
    return error.message if named else f"{error.key}: {error.message}"


def _verify_one(folder: Path, base: CliBase | None, allow_bin: bool, page_tokens: int, console: Console) -> None:
    against = base or implied_base(folder)
    spec = against.read(folder, allow_bin=allow_bin)
    pages = against.pages(spec, page_tokens)
    experts = f", {spec.num_experts} experts" if spec.num_experts else ""
    end = "whether it fits a base was not checked: give --base" if pages is None else f"{pages} pages"
    line = f"{folder}: {spec.kind}, rank {spec.rank}{experts}, {' '.join(spec.targets)}, {end}"
    print_line(console, "ok:", "green", line)
    for warning in spec.warnings:
        print_line(console, "  warning:", "yellow", warning)


def _adapter_folders(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            found = find_adapters(path)
        except AdapterFileError as error:
            fail(reason(error))
        if not found.paths:
            fail(f"{path}: neither an adapter nor a folder of adapters; an adapter has an adapter_config.json")
        for warning in found.warnings:
            print_line(Console(stderr=True), "warning:", "yellow", warning)
        yield from found.paths.values()


def _facts(path: Path) -> dict[str, Any]:
    summary = describe_adapter(path)
    facts = {"path": str(path), **asdict(summary), "identity": identity_of(path, allow_bin=True)}
    shapes = list_tensor_file(path).shapes
    if shapes is not None:
        facts["ranks"] = sorted({shape[0] for key, shape in shapes.items() if _A_HALF.search(key) and shape})
    if summary.num_experts:
        facts["experts_by_layer"] = None if shapes is None else _experts_by_layer(shapes)
    return facts


def _experts_by_layer(keys: Iterable[str]) -> dict[str, int]:
    """How many experts each layer has that has any."""
    found: dict[int, set[int]] = {}
    for key in keys:
        if match := _EXPERT.search(key):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    return {str(layer): len(found[layer]) for layer in sorted(found)}


def _facts_on(base: CliBase, path: Path, allow_bin: bool, page_tokens: int) -> dict[str, Any]:
    spec = base.read(path, allow_bin=allow_bin)
    ranks = sorted({pair.rank for pair in spec.pairs})
    return {"ranks": ranks, "pages": base.pages(spec, page_tokens), "warnings": spec.warnings}


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if (name in _EXPERTS_ONLY and not facts["num_experts"]) or (name == "invocation" and not value):
            continue
        table.add_row(name.replace("_", " ").removeprefix("num "), Text(_shown(name, value)))
    table_console().print(table)


def _shown(name: str, value: object) -> str:
    if name == "num_bytes" and isinstance(value, int):
        return f"{value} ({decimal(value)})"
    if isinstance(value, dict):
        return " ".join(f"{key}:{number}" for key, number in value.items())
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) if name != "warnings" else "\n".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
