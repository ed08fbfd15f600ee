"""Print what the wheel depends on: ``requirements.py PYPROJECT EXTRA,...``. Extras may name extras."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"loraplex\[(?P<extras>[^]]*)\]")


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The dependencies, and those of the extras.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted, seen = [*extras], set[str]()
    found: list[str] = [*project["dependencies"]]
    while wanted:
        extra = wanted.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for entry in project["optional-dependencies"][extra]:
            own = _OWN.fullmatch(entry)
            if own:
                wanted += [name.strip() for name in own["extras"].split(",")]
            else:
                found.append(entry)
    return found


if __name__ == "__main__":
    names = [name.strip() for name in sys.argv[2].split(",") if name.strip()]
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]), names)) + "\n")
