"""Blocks that no test runs are at least what they seem to be: shell, Python, YAML, and commands that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from loraplex.server.cli import app
from loraplex.server.settings import load_settings

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
FOREIGN_FIRST_COLUMN = "docs/migrate/"
THEIRS_ARE_ELSEWHERE = (
    "docs/cookbook/",
    "docs/benchmarks/",
    "docs/gpu.md",
    "docs/decisions/",
    "docs/notebook.md",
    "docs/routing.md",
)
OF_OTHER_TOOLS = {"--device", "--generation-config", "--help", "--data", "--grace-period", "--secret"}
"""Flags of pytest and others that prose names."""


def commands() -> dict[tuple[str, ...], Any]:
    """The commands of ``loraplex`` by their words."""
    found: dict[tuple[str, ...], Any] = {}

    def walk(words: tuple[str, ...], command: Any) -> None:
        found[words] = command
        for name, child in getattr(command, "commands", {}).items():
            walk((*words, name), child)

    walk((), typer.main.get_command(app))
    return found


COMMANDS = commands()
OPTIONS = {
    option
    for command in COMMANDS.values()
    for parameter in command.params
    for option in (*parameter.opts, *parameter.secondary_opts)
} | {"--help"}


def calls_in(script: str) -> Iterator[list[str]]:
    """Every call of ``loraplex`` in a script, as words."""
    joined = script.replace("\\\n", " ")
    for line in joined.splitlines():
        line = re.sub(r"\s#\s.*$", "", line)
        for part in re.split(r"&&|\|\||[|;]|\$\(", line):
            try:
                words = shlex.split(part)
            except ValueError:
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and Path(words[0]).name == "loraplex":
                yield words[1:]


def problem_of(words: list[str]) -> str | None:
    """Why ``loraplex`` would not take these words."""
    path: tuple[str, ...] = ()
    while words and (*path, words[0]) in COMMANDS:
        path = (*path, words.pop(0))
    command = COMMANDS[path]
    if getattr(command, "commands", None) and not any(word.startswith("-") for word in words[:1]):
        return f"{' '.join(path) or 'loraplex'} has no command {words[:1]}"
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((f"{' '.join(path)} has no flag {flag}" for flag in given if flag not in known), None)


def test_shell_blocks_are_shell(page: Any) -> None:
    for block in page.blocks:
        if block.is_shell:
            checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{block.where}: {checked.stderr}"


def test_other_blocks_parse(page: Any) -> None:
    for block in page.blocks:
        try:
            if block.is_python:
                ast.parse(block.text)
            elif block.language in {"yaml", "yml"} and "{{" not in block.text:
                list(yaml.safe_load_all(block.text))
            elif block.language == "toml":
                tomllib.loads(block.text)
            elif block.language == "json" and "..." not in block.text and "// " not in block.text:
                json.loads(block.text)
        except (SyntaxError, ValueError, yaml.YAMLError) as error:
            pytest.fail(f"{block.where}: {error}")


def test_files_of_settings_are_accepted(page: Any, tmp_path: Path) -> None:
    for block in page.blocks:
        if block.title in {"loraplex.yaml", "loraplex.toml"}:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            load_settings({"model": "somewhere"}, tmp_path / block.title)


def test_commands_and_their_flags_exist(page: Any) -> None:
    scripts = [(block.where, block.text) for block in page.blocks if block.is_shell]
    scripts += [
        (f"{page.name}:{line}", text)
        for line, text in page.code
        if text.split()[:1] in (["loraplex"], [".venv/bin/loraplex"])
    ]
    problems = []
    for where, script in scripts:
        for words in calls_in(script):
            shown = [word for word in words if word not in {"...", "…"}]
            alone = where.startswith(f"{page.name}:") and len(shown) < 2 and "`" not in script
            problem = None if not shown or (alone and (shown[0],) in COMMANDS) else problem_of(shown)
            if problem and " | " not in script:
                problems.append(f"{where}: {problem}")
    assert not problems, "\n".join(problems)


def test_flags_in_prose_exist(page: Any) -> None:
    if page.name.startswith(THEIRS_ARE_ELSEWHERE) or page.name.startswith(FOREIGN_FIRST_COLUMN):
        return
    known = OPTIONS | OF_OTHER_TOOLS
    spans = [(line, text) for line, text in page.code if text.startswith(("--", "loraplex "))]
    unknown = [
        f"{page.name}:{line}: {flag}" for line, text in spans for flag in FLAG.findall(text) if flag not in known
    ]
    assert not unknown, "\n".join(unknown)


def test_tables_of_migrations_name_our_flags(pages: list[Any]) -> None:
    """The first column is theirs; whatever stands in the others is ours."""
    tables = [page for page in pages if page.name.startswith(FOREIGN_FIRST_COLUMN)]
    assert len(tables) == 4
    unknown = []
    for page in tables:
        for line, (_, *ours) in page.rows:
            unknown += [
                f"{page.name}:{line}: {flag}" for cell in ours for flag in FLAG.findall(cell) if flag not in OPTIONS
            ]
    assert not unknown, "\n".join(unknown)


def test_a_wrong_command_or_flag_is_noticed() -> None:
    assert problem_of(["serve", "MODEL", "--adapters", "DIR"]) is None
    assert problem_of(["adapters", "load", "a", "b", "--replace"]) is None
    assert problem_of(["adapters", "load", "a", "b", "--replce"]) == "adapters load has no flag --replce"
    assert problem_of(["adapters", "lod", "a"]) == "adapters has no command ['lod']"
    assert [*calls_in("A=1 .venv/bin/loraplex serve \\\n  M --port=1 | cat; loraplex version")] == [
        ["serve", "M", "--port=1"],
        ["version"],
    ]
