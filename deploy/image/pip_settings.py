"""What this machine's pip is told, for a pip inside a build: ``pip_settings.py CONF`` writes a pip.conf and prints the
absolute paths that it names and that exist here, one a line, so that they can be mounted.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

# Where packages come from and whom to trust; the rest is taste.
KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "proxy", "constraint", "timeout")


def settings(listing: str) -> dict[str, str]:
    """Values by key from the output of ``pip config list``; the environment wins over files."""
    found: dict[str, str] = {}
    from_environment: dict[str, str] = {}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        scope, dot, key = name.rpartition(".")
        if not equals or not dot or key not in KEYS:
            continue
        (from_environment if scope.startswith(":env:") else found)[key] = ast.literal_eval(value)
    return found | from_environment


def local_paths(values: dict[str, str]) -> list[str]:
    """Paths among the values that exist here; of a file: URL the folder around it, since an index links there."""
    words = [word for value in values.values() for word in value.split()]
    folders = [str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file:///")]
    return sorted({path for path in [*words, *folders] if path.startswith("/") and Path(path).exists()} - {"/"})


def main(conf: str) -> None:
    """Write the file and print the paths."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, stdout=subprocess.PIPE)
    values = settings(listing.stdout.decode())
    lines = [f"{key} = {' '.join(value.split())}" for key, value in values.items()]
    Path(conf).write_text("\n".join(["[global]", *lines]) + "\n")
    sys.stdout.write("".join(f"{path}\n" for path in local_paths(values)))


if __name__ == "__main__":
    main(sys.argv[1])
