"""What is in the image, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
InImage = Callable[[str], str]

DISTRIBUTIONS = """
import json
from importlib.metadata import distributions
print(json.dumps([[found.metadata["Name"], found.version] for found in distributions()]))
"""

FILES = """
import os, stat
for folder, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in ("/proc", "/sys", "/dev")]
    for name in names:
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            print(oct(mode & 0o7777)[2:], path)
"""

TOOLCHAIN = {
    *("ar", "as", "c++", "cc", "clang", "cmake", "g++", "gcc", "go", "ld", "make", "ninja", "rustc", "tcc"),
    *("pip", "pip3", "curl", "git", "wget"),
}


def test_it_holds_the_pinned_packages_and_no_other(in_image: InImage) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    held = {canonicalize_name(name): version for name, version in json.loads(in_image(DISTRIBUTIONS))}
    assert held.pop("loraplex")
    assert {"torch", "fastapi", "obstore"} <= held.keys()
    assert {name: version.partition("+")[0] for name, version in held.items()} == {
        name: pins.get(name) for name in held
    }


def test_the_sbom_names_all_that_is_installed(in_image: InImage) -> None:
    sbom = json.loads(in_image("print(open('/usr/share/loraplex/sbom.cdx.json').read())"))
    assert (sbom["bomFormat"], sbom["metadata"]["component"]["name"]) == ("CycloneDX", "loraplex")
    named = {canonicalize_name(part["name"]): part["version"] for part in sbom["components"]}
    named |= {"loraplex": sbom["metadata"]["component"]["version"]}
    held = {canonicalize_name(name): version for name, version in json.loads(in_image(DISTRIBUTIONS))}
    assert named == held
    assert all(part["purl"].startswith("pkg:pypi/") for part in sbom["components"])


def test_it_holds_no_toolchain_and_no_tests(in_image: InImage) -> None:
    paths = [line.partition(" ")[2] for line in in_image(FILES).splitlines()]
    assert "/opt/loraplex/bin/loraplex" in paths
    tools = [path for path in paths if Path(path).name in TOOLCHAIN and "bin" in Path(path).parts]
    assert not tools
    packages = ("/site-packages/pip/", "/site-packages/setuptools/", "/dist-packages/pip/", "/ensurepip/", "/pytest/")
    assert not [path for path in paths if any(package in path for package in packages)]
    assert not [
        path for path in paths if path.startswith(("/build", "/opt/")) and not path.startswith("/opt/loraplex/")
    ]


def test_nothing_of_ours_is_writable_or_gives_privileges(in_image: InImage) -> None:
    for line in in_image(FILES).splitlines():
        mode, _, path = line.partition(" ")
        if path.startswith(("/opt/", "/usr/share/loraplex/")) and mode != "777":  # links are
            assert not int(mode, 8) & 0o6022, line


def test_byte_code_is_there_and_depends_on_no_time_stamp(in_image: InImage) -> None:
    flags = in_image(
        "import importlib.util as u, pathlib, torch, loraplex.server.cli as c\n"
        "for module in (torch, c): print(pathlib.Path(u.cache_from_source(module.__file__)).read_bytes()[4])"
    )
    assert flags.split() == ["1", "1"]  # unchecked hashes: PEP 552


def test_its_description_is_as_the_dockerfile_says(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["loraplex"]
    assert config["Cmd"][0] == "demo"
    assert config["StopSignal"] == "SIGTERM"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"]
    assert labels["org.loraplex.variant"] == "cpu"
    assert "/livez" in " ".join(image["Healthcheck"]["Test"])


def test_the_size_is_told_and_bounded(image: dict[str, Any], report: Callable[[str], None]) -> None:
    report(f"image: {image['Size'] / 2**20:.0f} MiB in {len(image['RootFS']['Layers'])} layers")
    assert image["Size"] < 2 * 2**30
