"""The work of ``loraplex adapters convert``: adapters written in a form that can be served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loraplex.memory.adapter_config import read_config
from loraplex.memory.adapter_convert import AdapterContent, in_modern_form, write_adapter
from loraplex.memory.adapter_convert_initialised import is_subtracted, plain_from_initialised
from loraplex.memory.adapter_convert_meteora import Gates, meteora_from
from loraplex.memory.adapter_convert_tokenwise import tokenwise_from
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.server.cli_adapter_files import reason
from loraplex.server.cli_base import CliBase, implied_base, open_base
from loraplex.server.cli_report import fail, print_line, server_errors_reported


def convert(
    paths: Sequence[Path],
    out: Path,
    base: Path | None,
    *,
    gates: Sequence[Path],
    router: Path | None,
    initial: Path | None,
    top_k: int,
    temperature: float,
    allow_bin: bool,
    force: bool,
) -> None:
    """Convert adapters into one folder; read it back before it appears."""
    if len(paths) > 1 and not gates and router is None:
        fail("several adapters become one by --gates (MeteoRA) or --router (token-wise); give one of them")
    if [bool(gates), router is not None, initial is not None].count(True) > 1:
        fail("--gates, --router and --initial exclude each other; give one of them")
    opened = None if base is None else open_base(base, "auto")
    read_back: list[AdapterSpec] = []

    def check(folder: Path) -> None:
        read_back.append((opened or implied_base(folder)).read(folder))

    try:
        with server_errors_reported():
            if gates:
                shape = _needed(opened, "--gates").shape
                found = Gates.read(gates, allow_bin=allow_bin)
                content = meteora_from(paths, found, shape, top_k=top_k, temperature=temperature, allow_bin=allow_bin)
            elif router is not None:
                shape = _needed(opened, "--router").shape
                content = tokenwise_from(paths, router, shape, top_k=top_k, allow_bin=allow_bin)
            else:
                content = _one(paths[0], opened, initial, allow_bin)
            write_adapter(content, out, replace=force, check=check)
    except AdapterFileError as error:
        fail(reason(error))
    _report(out, read_back[0], content.warnings)


def _one(path: Path, base: CliBase | None, initial: Path | None, allow_bin: bool) -> AdapterContent:
    if initial is None and not is_subtracted(read_config(path)):
        return in_modern_form(path, allow_bin=allow_bin)
    weights = None if base is None else base.weights
    return plain_from_initialised(path, weights, initial=initial, allow_bin=allow_bin)


def _needed(base: CliBase | None, option: str) -> CliBase:
    return base or fail(f"{option} needs the base model that the adapters are for; give --base")


def _report(out: Path, spec: AdapterSpec, warnings: Sequence[str]) -> None:
    console = Console()
    experts = f", {spec.num_experts} experts" if spec.num_experts else ""
    print_line(
        console, "converted:", "green", f"{out}: {spec.kind}, rank {spec.rank}{experts}, {' '.join(spec.targets)}"
    )
    for warning in (*warnings, *spec.warnings):
        print_line(console, "  warning:", "yellow", warning)
