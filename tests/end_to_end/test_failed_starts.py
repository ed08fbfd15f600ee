"""Starts that cannot be: exit status 1 (2 for a wrong flag), and one line that says why and what is accepted."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from loraplex.server.cli import app
from loraplex.server.demo.assets import adapters_folder, base_folder

BASE = str(base_folder())


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def fail() -> Callable[..., str]:
    """Run ``loraplex serve`` in this process, with the engine in it too, and hand back the one line of its error."""

    def run(*arguments: str, status: int = 1) -> str:
        result = CliRunner().invoke(app, ["serve", *arguments, "--port", "0", "--engine", "inline"])
        assert result.exit_code == status, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.stderr
        assert result.stdout == ""
        return lines[0]

    return run


@pytest.fixture
def other_architecture(tmp_path: Path) -> Path:
    """A copy of the demo's base that calls itself something else."""
    folder = tmp_path / "other"
    shutil.copytree(base_folder(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_no_model_and_a_model_that_is_not_there(fail: Any, tmp_path: Path) -> None:
    assert "model: required. Folder of a Hugging Face checkpoint" in fail()
    assert f"'{tmp_path / 'nothing'}': no such folder" in fail(str(tmp_path / "nothing"))
    assert "config.json" in fail(str(tmp_path))


def test_a_broken_checkpoint_is_named_by_its_file(fail: Any, tmp_path: Path) -> None:
    for file, content in (("tokenizer.json", "{"), ("model.safetensors", "{"), ("config.json", "[]")):
        folder = tmp_path / file
        shutil.copytree(base_folder(), folder)
        (folder / file).write_text(content, encoding="utf-8")
        assert str(folder) in fail(str(folder))
    without = tmp_path / "without-tokenizer"
    shutil.copytree(base_folder(), without, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in fail(str(without))


def test_a_bad_value_is_named_with_what_is_accepted(fail: Any) -> None:
    error = fail(BASE, "--dtype", "float8", "--page-tokens", "many")
    assert "dtype" in error
    assert "'bfloat16'" in error
    assert "page_tokens" in error


def test_an_unknown_variable_is_named_with_the_known_ones(fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_POOL_SIZE", "1GiB")
    error = fail(BASE)
    assert "LORAPLEX_POOL_SIZE" in error
    assert "LORAPLEX_POOL_BYTES" in error


def test_an_unknown_key_of_the_file_is_named_with_the_known_ones(fail: Any, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('pool_size = "1GiB"\n', encoding="utf-8")
    error = fail(BASE, "--config", str(file))
    assert "pool_size" in error
    assert "pool_bytes" in error
    assert str(tmp_path / "none.yaml") in fail(BASE, "--config", str(tmp_path / "none.yaml"))


def test_adapters_that_are_not_there_are_named(fail: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in fail(BASE, "--adapters", str(tmp_path / "none"))
    assert f"mine={tmp_path / 'none'}" in fail(BASE, "--adapter", f"mine={tmp_path / 'none'}")
    assert "NAME=PATH" in fail(BASE, "--adapter", "mine")
    assert "base model" in fail(BASE, "--adapter", f"base={adapters_folder() / 'upper'}")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", BASE, "--port", port, "--engine", "inline"])
    assert result.exit_code == 1
    assert f"port {port}" in result.stderr


def test_a_pool_without_a_page_is_refused_with_the_numbers(fail: Any) -> None:
    error = fail(BASE, "--pool-bytes", "1000")
    assert "1000" in error
    assert "page" in error
    assert "available" in fail(BASE, "--pool-bytes", "100TiB")


def test_a_context_beyond_the_models_is_refused_with_the_numbers(fail: Any) -> None:
    error = fail(BASE, "--max-model-len", "4096")
    assert "4096" in error
    assert "1024" in error


def test_an_unsupported_architecture_is_named_with_those_that_are_served(fail: Any, other_architecture: Path) -> None:
    error = fail(str(other_architecture))
    assert "GPT2LMHeadModel" in error
    for served in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert served in error


def test_the_real_command_says_the_same(run_command: Callable[..., Any], other_architecture: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        engine = pool.submit(run_command, "serve", other_architecture, "--port", "0")
        flag = pool.submit(run_command, "serve", BASE, "--pool-size", "1GiB").result()
    assert flag.returncode == 2
    assert "--pool-size" in flag.stderr
    assert engine.result().returncode == 1
    assert "GPT2LMHeadModel" in engine.result().stderr
    assert "Traceback" not in engine.result().stderr
