"""The commands that speak to a server, and those that look at adapter folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.server.cli import app
from loraplex.server.demo.assets import adapters_folder, base_folder

Run = Callable[..., Any]


def test_chat_answers_what_comes_in_on_a_pipe(demo: Any, run_command: Run) -> None:
    answer = run_command("chat", "--adapter", "upper", "--url", demo.url, "--temperature", "0", stdin="hello\n")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "HELLO\n", "")


@pytest.fixture
def here(demo: Any) -> Iterator[dict[str, str]]:
    """An environment that names the server; the adapter ``typed`` is gone from it after the test."""
    yield {"LORAPLEX_URL": demo.url}
    demo.request("DELETE", "/v1/adapters/typed")


def test_adapters_are_loaded_listed_and_unloaded(here: dict[str, str], run_command: Run, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    loaded = run_command("adapters", "load", "typed", folder.path, env=here)
    assert loaded.returncode == 0
    assert loaded.stdout.startswith(f"loaded typed: rank {folder.config['r']}, ")
    heading, *names = [line.split()[0] for line in run_command("adapters", "list", env=here).stdout.splitlines()]
    assert heading == "name"
    assert {"typed", "upper"} < set(names)
    told = json.loads(run_command("adapters", "list", "--json", env=here).stdout)
    assert str(folder.path) in [one["path"] for one in told]
    folder.weights.write_bytes(b"nothing")
    refused = run_command("adapters", "load", "typed", folder.path, "--replace", env=here)
    assert refused.returncode == 1
    assert "adapter_model.safetensors" in refused.stderr
    assert run_command("adapters", "unload", "typed", env=here).returncode == 0
    again = run_command("adapters", "unload", "typed", env=here)
    assert (again.returncode, again.stdout) == (1, "")
    assert "'typed' does not exist" in again.stderr


def test_the_version_is_told_by_a_command_and_by_a_flag() -> None:
    told, flagged = (CliRunner().invoke(app, [asked]) for asked in ("version", "--version"))
    assert told.stdout.startswith("loraplex ")
    assert (flagged.exit_code, flagged.stdout) == (0, told.stdout)


def test_folders_are_inspected(copy_adapter: Any) -> None:
    folder = copy_adapter("sort")
    inspected = CliRunner().invoke(app, ["adapters", "inspect", str(folder.path), "--json"])
    facts = json.loads(inspected.stdout)
    assert (inspected.exit_code, facts["kind"], facts["path"]) == (0, "lora", str(folder.path))
    assert facts["rank"] >= folder.config["r"]


def test_folders_are_verified(copy_adapter: Any) -> None:
    broken = copy_adapter("sort", "broken")
    broken.weights.write_bytes(b"nothing")
    asked = ["adapters", "verify", str(adapters_folder()), str(broken.path), "--base", str(base_folder())]
    verified = CliRunner().invoke(app, asked)
    *lines, summary = verified.stdout.splitlines()
    good = sum(1 for _ in adapters_folder().iterdir())
    assert sum(line.startswith("ok: ") for line in lines) == good
    assert summary.startswith(f"{good} of {good + 1} adapters")
    assert "broken" in verified.stderr
    assert verified.exit_code == 1
