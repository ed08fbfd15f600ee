from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loraplex.server.cli_adapters import adapters_app
from loraplex.server.errors import ConflictError
from loraplex.server.registry_file import RegistryFile


@pytest.fixture
def run(serve: Callable[..., Any], state: RegistryFile) -> Callable[..., Result]:
    """Runs a command against a server that takes uploads."""
    url = serve(state=state).url

    def run_command(*arguments: str | Path) -> Result:
        words = [*(str(argument) for argument in arguments), "--url", url]
        return CliRunner().invoke(adapters_app, words, catch_exceptions=False)

    return run_command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_list_asks_for_what_it_is_told(run: Callable[..., Result], folder: Path) -> None:
    run("load", "green", folder, "--tag", "new", "--pin")
    assert [one["id"] for one in json.loads(run("list", "--json", "--state", "ready").stdout)] == ["green"]
    assert [one["id"] for one in json.loads(run("list", "--json", "--not-pinned", "--limit", "1").stdout)] == ["blue"]
    assert "pool (pinned)" in run("list", "--tag", "new").stdout
    refused = run("list", "--kind", "lorax")
    assert refused.exit_code == 1
    assert "'lora', 'dora'" in refused.stderr


def test_show_tells_all_there_is(run: Callable[..., Result], folder: Path) -> None:
    run("load", "green", folder, "--tag", "b", "--tag", "a")
    lines = dict(line.strip().split(maxsplit=1) for line in run("show", "green").stdout.splitlines())
    assert (lines["state"], lines["tags"], lines["bytes"], lines["pinned"]) == (
        "ready",
        "a b",
        "1024 (1.0 kB)",
        "false",
    )
    assert json.loads(run("show", "green", "--json").stdout)["rank"] == 8
    assert "does not exist" in run("show", "none").stderr


def test_upload_sends_a_folder_of_this_machine(run: Callable[..., Result], folder: Path, state: RegistryFile) -> None:
    result = run("upload", "green", folder)
    assert result.stdout.startswith(f"uploaded green: rank 8, 2 pages, {state.adapters}")
    assert "no adapter" in run("upload", "green", folder.parent / "none").stderr


def test_pinning_unpinning_prefetching_and_tagging(run: Callable[..., Result], engine: Any) -> None:
    assert run("pin", "red").stdout == "pinned red: 2 pages\n"
    assert run("unpin", "red").stdout == "unpinned red\n"
    assert run("prefetch", "red", "--tier", "host").stdout == "prefetched red: host\n"
    assert run("tag", "red", "b", "a").stdout == "tagged red: a b\n"
    assert run("tag", "red").stdout == "tagged red: no tags\n"
    assert (engine.pins, engine.prefetched) == ([("red", 0, True), ("red", 0, False)], [("red", "host")])


def test_a_refused_pin_is_one_line(run: Callable[..., Result], engine: Any) -> None:
    engine.pin_error = ConflictError("Pinned adapters may take 8 pages.")
    result = run("pin", "red")
    assert (result.exit_code, result.stderr) == (1, "error: Pinned adapters may take 8 pages.\n")
