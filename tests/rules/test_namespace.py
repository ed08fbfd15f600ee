"""The rooms are folders of common names in the repository's root; they must not hide other packages of these names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_in_root(code: str, path: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("room", ["server", "memory", "kernels", "clients"])
def test_a_room_is_no_regular_package(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists()
    assert not (ROOT / "loraplex").exists()


def test_transformers_finds_no_kernels_package_where_none_is_installed() -> None:
    code = "import transformers.utils.import_utils as u; print(u.is_kernels_available())"
    assert python_in_root(code) == "False"


def test_an_installed_kernels_package_is_found_from_the_repository_root(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("ORIGIN = 'installed'\n")
    assert python_in_root("import kernels; print(kernels.ORIGIN)", str(tmp_path)) == "installed"


def test_our_rooms_are_found_below_the_namespace_from_the_repository_root() -> None:
    code = "import loraplex.memory.page_pool as m; print(m.__file__)"
    assert python_in_root(code) == str(ROOT / "memory" / "page_pool.py")
