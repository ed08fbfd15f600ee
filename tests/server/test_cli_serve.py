"""What ``loraplex serve`` and ``loraplex demo`` make of their arguments, without serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.server import cli_serve
from loraplex.server.cli import app
from loraplex.server.settings import Settings, load_settings


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``settings_of("demo", "--port", "1")``: the settings that a server would have."""
    loaded: list[Settings] = []

    def run(_: str, flags: dict[str, Any], config: Path | None) -> None:
        loaded.append(load_settings(flags, config))

    monkeypatch.setattr(cli_serve, "run_lazily", run)

    def of(*arguments: str) -> Settings:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return loaded.pop()

    return of


def test_both_commands_take_a_file_of_settings(settings_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1234\nmax_running: 3\nstate_dir: /state\n", encoding="utf-8")
    for command in (["serve", "base"], ["demo"]):
        settings = settings_of(*command, "--config", str(file), "--port", "4321")
        assert (settings.port, settings.max_running, settings.state_dir) == (4321, 3, Path("/state"))


def test_the_demo_stays_the_demo_whatever_the_file_names(settings_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: other\nadapters: /elsewhere\nserved_model_name: other\n", encoding="utf-8")
    told, plain = settings_of("demo", "--config", str(file)), settings_of("demo")
    assert (told.model, told.adapters, told.model_name) == (plain.model, plain.adapters, "loraplex-demo")
