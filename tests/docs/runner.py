"""Runs code blocks: shell in bash, Python in one interpreter that keeps what it imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 540
_DRIVER = """
import contextlib, io, json, os, sys, traceback
pages, real = {}, sys.stdout
for line in sys.stdin:
    asked = json.loads(line)
    os.chdir(asked["folder"])
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            code = compile("\\n" * (asked["line"] - 1) + asked["code"], asked["page"], "exec")
            exec(code, pages.setdefault(asked["page"], {"__name__": "__main__"}))
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps({"printed": printed.getvalue(), "error": error}), file=real, flush=True)
"""


class Interpreter:
    """A Python process that runs blocks; those of one page share their names."""

    def __init__(self, python: str, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, "-c", _DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)
        )

    def run(self, block: Any, code: str, folder: Path) -> str:
        """What the block prints; AssertionError with its traceback if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"code": code, "line": block.line, "page": str(block.page), "folder": str(folder)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["error"] is None, f"{block.where} failed:\n{answer['error']}"
        return str(answer["printed"])

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(SECONDS)


@dataclass
class Runner:
    """Runs blocks against one server.

    Attributes:
        address: host and port of the server, put in place of those that pages show.
        files: stands for ``/srv`` on pages.
        client_python: an interpreter with the packages that blocks need beyond those of the tests.
    """

    address: str
    files: Path
    client_python: str | None = None
    _interpreters: dict[str, Interpreter] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("LORAPLEX_")}
        bins = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        url = f"http://{self.address}"
        told = {"LORAPLEX_URL": url, "COLUMNS": "120", "OPENAI_API_KEY": "none"}
        return kept | told | {"PATH": bins, "OMP_NUM_THREADS": "1"}  # threads that spin make a full machine slower

    def localised(self, text: str) -> str:
        """A block's text with the address and the files of this test."""
        text = text.replace("127.0.0.1:8000", self.address).replace("localhost:8000", self.address)
        return re.sub(r"(?<![\w/])/srv/", f"{self.files}/", text)

    def can_run(self, block: Any) -> bool:
        return block.is_run and (not block.needs or self.client_python is not None)

    def run(self, block: Any, folder: Path) -> None:
        """Run a block in a folder, or write it there; AssertionError if it fails or prints something else."""
        if block.title is not None:
            (folder / block.title).write_text(self.localised(block.text), encoding="utf-8")
        elif self.can_run(block):
            printed = self._shell(block, folder) if block.is_shell else self._python(block, folder)
            if block.output is not None:
                difference = unlike(block.output.text, printed.replace(str(self.files), "/srv"), block.output.language)
                assert difference is None, f"{block.where} does not print what {block.output.where} says: {difference}"

    def close(self) -> None:
        for interpreter in self._interpreters.values():
            interpreter.close()

    def _shell(self, block: Any, folder: Path) -> str:
        link = folder / ".venv"
        if not link.exists():
            link.symlink_to(sys.prefix)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.localised(block.text)],
            cwd=folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block.where} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def _python(self, block: Any, folder: Path) -> str:
        python = self.client_python if block.needs and self.client_python else sys.executable
        if python not in self._interpreters:
            self._interpreters[python] = Interpreter(python, self.env)
        return self._interpreters[python].run(block, self.localised(block.text), folder)


def unlike(shown: str, printed: str, language: str) -> str | None:
    """How an output differs from what a page shows; None if it does not."""
    if language == "json":
        shown, printed = ("".join(text.split()) for text in (shown, printed))
    else:
        shown, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (shown, printed))
    pattern = re.escape(shown).replace(re.escape("..."), ".*")
    return None if re.fullmatch(pattern, printed, re.DOTALL) else f"it printed\n{printed}"
