"""Names of metrics, settings and error codes that pages use are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loraplex.server.errors import ERRORS_BY_NAME
from loraplex.server.settings import CLIENT_VARIABLES, PREFIX, Settings

METRIC = re.compile(r"\bloraplex_[a-z][a-z_]*[a-z]\b")
VARIABLE = re.compile(r"\bLORAPLEX_[A-Z_]*[A-Z]\b")
SNAKE = re.compile(r"[a-z]+(?:_[a-z]+)+")


OF_COMPOSE = {"LORAPLEX_VARIANT"}
"""What deploy/compose.yaml reads."""


def test_metrics_on_pages_exist(pages: list[Any], metric_names: set[str]) -> None:
    unknown = {
        f"{page.name}: {name}"
        for page in pages
        for name in METRIC.findall(page.path.read_text(encoding="utf-8"))
        if name not in metric_names
    }
    assert not unknown


def test_environment_variables_on_pages_exist(page: Any) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES | OF_COMPOSE
    assert {*VARIABLE.findall(page.path.read_text(encoding="utf-8"))} <= known


def test_codes_and_settings_of_the_operations_page_exist(markdown: Any) -> None:
    page = markdown.read_page(markdown.ROOT / "docs" / "operations.md")
    sources = "\n".join(file.read_text() for file in sorted((markdown.ROOT / "server").glob("*.py")))
    words = set(re.findall(r"[a-z]+(?:_[a-z]+)+", sources))
    named = {text for _, text in page.code if SNAKE.fullmatch(text) and not text.startswith("loraplex_")}
    assert named
    assert {name for name in named if name not in words} == set()


def test_the_table_of_errors_has_every_type_status_and_code(markdown: Any) -> None:
    page = markdown.read_page(markdown.ROOT / "docs" / "operations.md")
    rows = [cells for _, cells in page.rows if len(cells) == 5 and cells[0].isdecimal()]
    told = {
        (int(status), kind.strip("`"), code)
        for status, kind, codes, *_ in rows
        for code in re.findall(r"`(\w+)`", codes) or [None]
    }
    internal = {
        "EngineStartError",
        "SettingsError",
        "CheckpointError",
        "LoraplexError",
        "NotFoundError",
        "MethodNotAllowedError",
    }
    raised = {
        (error.status, error.type, error.default_code) for name, error in ERRORS_BY_NAME.items() if name not in internal
    }
    assert raised <= told
    codes = {code for _, _, code in told if code}
    text = "\n".join(
        file.read_text() for room in ("server", "memory") for file in Path(markdown.ROOT / room).glob("*.py")
    )
    written = set(re.findall(r'\bcode="(\w+)"', text)) | set(re.findall(r'default_code(?:: [^=]+)? = "(\w+)"', text))
    assert written - {"engine_start", "settings", "invalid_checkpoint", "unsupported_model"} <= codes
    assert codes <= written
