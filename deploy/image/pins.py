"""Pinned versions of the image: which are to be installed, and whether an environment holds nothing else.

    pins.py merge FILE...      print the pins of all files; of a package in several, the last
    pins.py check FILE PYTHON  fail unless all that PYTHON's environment holds is pinned in FILE, at that version

It runs while the image is built, with nothing installed but Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

OWN = "loraplex"
_LIST = """
import importlib.metadata, json
print(json.dumps([(found.metadata["Name"], found.version) for found in importlib.metadata.distributions()]))
"""


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(paths: Iterable[Path]) -> dict[str, str]:
    """Versions by normal name; later files win.

    Raises:
        ValueError: a line is neither a pin nor a comment.
    """
    pins: dict[str, str] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            entry = line.partition("#")[0].strip()
            if not entry:
                continue
            name, equals, version = entry.partition("==")
            if not equals:
                raise ValueError(f"{path}: {entry!r} is not a pin of the form NAME==VERSION")
            pins[normal(name)] = version
    return pins


def strangers(pins: dict[str, str], installed: Iterable[tuple[str, str]]) -> list[str]:
    """What is installed but not pinned at that version. A local label (2.13.0+cpu) names a build, not a version."""
    return sorted(
        f"{name} {version} (pinned: {pins.get(normal(name), 'not')})"
        for name, version in installed
        if normal(name) != OWN and pins.get(normal(name)) not in (version, version.partition("+")[0])
    )


def installed_in(python: str) -> list[tuple[str, str]]:
    """Names and versions of all distributions that an interpreter sees."""
    found = subprocess.run([python, "-I", "-c", _LIST], check=True, capture_output=True, text=True)  # noqa: S603
    return [(name, version) for name, version in json.loads(found.stdout)]


def main(arguments: list[str]) -> int:
    """Run one of the two commands; the exit status."""
    match arguments:
        case ["merge", *files] if files:
            for name, version in sorted(read_pins(map(Path, files)).items()):
                sys.stdout.write(f"{name}=={version}\n")
            return 0
        case ["check", file, python]:
            found = strangers(read_pins([Path(file)]), installed_in(python))
            for line in found:
                sys.stderr.write(f"not as pinned: {line}\n")
            return 1 if found else 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
