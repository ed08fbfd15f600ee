"""The image's recipe and scripts, read: what a build would show is in tests/deploy/live."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
CI = [path for path in (ROOT / ".ci").iterdir() if path.read_bytes().startswith(b"#!")]
OURS = [*(ROOT / "deploy").rglob("*.sh"), *(ROOT / "tests" / "deploy").rglob("*.sh")]
SCRIPTS = sorted([*CI, *(script for script in OURS if "node_modules" not in script.parts)])


def pins(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def closure(extra: str, known: dict[str, str]) -> set[str]:
    """Names of all that ``loraplex[extra]`` brings, by what is installed here."""
    wanted, seen = [("loraplex", extra)], set[tuple[str, str]]()
    while wanted:
        name, of_extra = wanted.pop()
        if (name, of_extra) in seen:
            continue
        seen.add((name, of_extra))
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": of_extra}):
                assert canonicalize_name(needed.name) in {*known, "loraplex"}, f"{name} needs {line}: not pinned"
                wanted += [(needed.name, further) for further in {"", *needed.extras}]
    return {canonicalize_name(name) for name, _ in seen} - {"loraplex"}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    tool = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([tool, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_shellcheck_finds_nothing_in_a_script(script: Path, require_tool: Callable[[str], str]) -> None:
    command = [require_tool("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", script]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("extra", ["", "remote", "otel"])
def test_everything_that_the_image_installs_is_pinned(extra: str) -> None:
    assert {"torch", "fastapi", "transformers"} <= closure(extra, pins("constraints.txt"))


def test_the_pins_of_the_build_do_not_contradict_those_of_the_project() -> None:
    project, tools = pins("constraints.txt"), pins("deploy/image/build-tools.txt")
    assert "cyclonedx-bom" in tools
    assert {name: version for name, version in tools.items() if project.get(name, version) != version} == {}


def test_the_cuda_pins_are_for_the_torch_that_is_pinned() -> None:
    text = (ROOT / "deploy" / "constraints-cuda.txt").read_text()
    assert f"torch {pins('constraints.txt')['torch']} " in text, "make constraints-cuda.txt anew for this torch"


def test_the_version_of_image_and_compose_file_is_the_project_s() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"ARG VERSION={version[1]}\n" in DOCKERFILE.read_text()
    assert f"image: loraplex:{version[1]}\n" in (ROOT / "deploy" / "compose.yaml").read_text()


def test_the_build_sees_every_room_and_no_test() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = set(re.findall(r"^COPY ([a-z]+) \1$", DOCKERFILE.read_text(), re.MULTILINE))
    packages = re.findall(r'^"loraplex\.(\w+)" = ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(packages) == sources
    assert sources <= allowed
    assert not {"tests", "docs"} & allowed
