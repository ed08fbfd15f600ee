"""The scripts that run while the image is built."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "deploy" / "image"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pins_of_a_later_file_win(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("# why\nTriton==3.6.0\npydantic_core==2.50.4\n")
    (tmp_path / "cuda.txt").write_text("triton==3.7.1  # of torch\n")
    merged = subprocess.run(
        [sys.executable, SCRIPTS / "pins.py", "merge", tmp_path / "all.txt", tmp_path / "cuda.txt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert merged.stdout == "pydantic-core==2.50.4\ntriton==3.7.1\n"


def test_a_range_is_no_pin(tmp_path: Path) -> None:
    (tmp_path / "loose.txt").write_text("numpy>=2\n")
    with pytest.raises(ValueError, match="not a pin"):
        script("pins").read_pins([tmp_path / "loose.txt"])


def test_what_is_installed_must_be_pinned_at_that_version() -> None:
    pins = {"torch": "2.13.0", "numpy": "2.4.6", "pydantic-core": "2.50.4"}
    held = [("torch", "2.13.0+cpu"), ("pydantic_core", "2.50.4"), ("loraplex", "0.1.0")]
    strangers = script("pins").strangers
    assert strangers(pins, held) == []
    assert strangers(pins, [*held, ("numpy", "2.4.7"), ("left-pad", "1.0")]) == [
        "left-pad 1.0 (pinned: not)",
        "numpy 2.4.7 (pinned: 2.4.6)",
    ]


def test_an_environment_with_something_unpinned_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("numpy==2.4.6\n")
    checked = subprocess.run(
        [sys.executable, SCRIPTS / "pins.py", "check", tmp_path / "pins.txt", sys.executable],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 1
    assert "not as pinned: pytest" in checked.stderr


def test_requirements_follow_the_project_s_own_extras(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["a>=1"]\n'
        '[project.optional-dependencies]\ncuda = ["triton>=3"]\nfast = ["loraplex[cuda]", "b"]\n'
    )
    requirements = script("requirements").requirements
    assert requirements(tmp_path / "pyproject.toml", []) == ["a>=1"]
    assert requirements(tmp_path / "pyproject.toml", ["fast"]) == ["a>=1", "b", "triton>=3"]
    with pytest.raises(KeyError):
        requirements(tmp_path / "pyproject.toml", ["slow"])


def test_a_build_is_told_what_pip_is_told_here(tmp_path: Path) -> None:
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "ca.pem").touch()
    told = script("pip_settings")
    values = told.settings(
        f":env:.cert='{tmp_path}/ca.pem'\n"
        ":env:.quiet='1'\n"
        "global.cert='/elsewhere.pem'\n"
        f"global.extra-index-url='file://{tmp_path}/index/simple https://packages.example/simple'\n"
    )
    assert values == {
        "cert": f"{tmp_path}/ca.pem",
        "extra-index-url": f"file://{tmp_path}/index/simple https://packages.example/simple",
    }
    assert told.local_paths(values) == [f"{tmp_path}/ca.pem", f"{tmp_path}/index"]


@pytest.mark.parametrize(("variant", "cuda"), [("cpu", None), ("cuda", "13.0")])
def test_a_torch_of_the_other_variant_fails_the_build(variant: str, cuda: str | None) -> None:
    fault = script("torch_variant").fault
    assert fault(variant, cuda) is None
    assert "torch is built" in fault("cuda" if variant == "cpu" else "cpu", cuda)
