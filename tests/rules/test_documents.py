"""Documents that are made from code are as the code is now."""

from __future__ import annotations

from pathlib import Path

from loraplex.server.settings_table import settings_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_table(), "run `make docs`"


def test_the_architecture_names_only_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    words = [word.strip("`().,") for word in text.replace("|", " ").split()]
    named = [word for word in words if word.endswith(".py") and word != "__init__.py"]
    rooms = ("server", "memory", "kernels", "clients")
    missing = [name for name in named if not any((ROOT / room / Path(name).name).is_file() for room in rooms)]
    assert named
    assert not missing
