"""The work of ``loraplex adapters inspect`` and ``verify``: adapter folders, read without a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from loraplex.memory.adapter_config import LoraConfig, read_config
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, find_adapters, read_adapter
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_image import plan_layout
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.memory.arena import page_shape
from loraplex.memory.tensor_file import read_regular_file
from loraplex.server import checkpoint
from loraplex.server.base_matrices import BaseMatrices
from loraplex.server.cli_report import fail, print_error, print_line, server_errors_reported, table_console
from loraplex.server.traits import ModelTraits, read_traits


def inspect(path: Path, base: Path | None, *, allow_bin: bool, page_tokens: int, as_json: bool) -> None:
    """Print what an adapter folder holds, and what it takes on a base where one is given."""
    try:
        facts = _facts(path)
        if base is not None:
            facts |= _facts_on(base, path, allow_bin, page_tokens)
    except AdapterFileError as error:
        fail(_reason(error))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def verify(paths: Sequence[Path], base: Path, *, allow_bin: bool, page_tokens: int) -> None:
    """Read adapters in full against a base: a line for each, exit code 1 if one of them cannot be served."""
    traits = _read_base(base)
    console = Console()
    count = num_bad = 0
    for folder in _adapter_folders(paths):
        count += 1
        try:
            spec = _read(folder, base, traits, allow_bin)
        except AdapterFileError as error:
            num_bad += 1
            print_error(f"{folder}: {_reason(error)}")
            continue
        pages = _pages(spec, traits, page_tokens)
        line = f"{folder}: {spec.kind}, rank {spec.rank}, {' '.join(spec.targets)}, {pages} pages"
        print_line(console, "ok:", "green", line)
        for warning in spec.warnings:
            print_line(console, "  warning:", "yellow", warning)
    if count > 1:
        console.print(f"{count - num_bad} of {count} adapters can be served on {base}", soft_wrap=True, markup=False)
    if num_bad:
        raise typer.Exit(1)


def _read_base(folder: Path) -> ModelTraits:
    if not folder.is_dir():
        fail(f"--base {folder}: no such folder; accepted is the folder of a base model with its config.json")
    with server_errors_reported():
        return read_traits(checkpoint.read_config(folder))


def _adapter_folders(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            found = find_adapters(path)
        except AdapterFileError as error:
            fail(_reason(error))
        if not found.paths:
            fail(f"{path}: neither an adapter nor a folder of adapters; an adapter has an adapter_config.json")
        for warning in found.warnings:
            print_line(Console(stderr=True), "warning:", "yellow", warning)
        yield from found.paths.values()


def _read(path: Path, base: Path, traits: ModelTraits, allow_bin: bool) -> AdapterSpec:
    with server_errors_reported():
        return read_adapter(
            path,
            traits.base_shape,
            allow_bin=allow_bin,
            base_name=str(base),
            dtype=traits.torch_dtype,
            base_weights=BaseMatrices(base, traits),
        )


def _facts(path: Path) -> dict[str, Any]:
    summary = describe_adapter(path)
    return {"path": str(path), **asdict(summary), "identity": _identity(path, summary.kind, summary.file)}


def _facts_on(base: Path, path: Path, allow_bin: bool, page_tokens: int) -> dict[str, Any]:
    traits = _read_base(base)
    spec = _read(path, base, traits, allow_bin)
    ranks = sorted({pair.rank for pair in spec.pairs})
    return {"ranks": ranks, "pages": _pages(spec, traits, page_tokens), "warnings": spec.warnings}


def _identity(path: Path, kind: str, file: str) -> str:
    """As ``AdapterSpec.identity``, without a base to check against."""
    digest = hashlib.sha256(read_regular_file(path, file, None)).digest()
    return adapter_identity(kind, digest, LoraConfig.parse(read_config(path)).settings)


def _pages(spec: AdapterSpec, traits: ModelTraits, page_tokens: int) -> int:
    """Pages that the adapter takes in the pool of a server with such pages."""
    dtype = spec.pairs[0].a.dtype if traits.torch_dtype is None else traits.torch_dtype
    shape = page_shape(traits.num_layers, traits.kv_size, page_tokens, dtype)
    return plan_layout(spec, traits.num_layers).num_pages(shape.page_elems)


def _reason(error: AdapterFileError) -> str:
    named = error.key is None or error.key in error.message
    return error.message if named else f"{error.key}: {error.message}"


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " ").removeprefix("num "), Text(_shown(name, value)))
    table_console().print(table)


def _shown(name: str, value: object) -> str:
    if name == "num_bytes" and isinstance(value, int):
        return f"{value} ({decimal(value)})"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) if name != "warnings" else "\n".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
