"""Writes the dashboards' JSON into the chart: ``python deploy/dashboards/write.py [FOLDER]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters_and_pool
import overview
import tenants

FOLDER = Path(__file__).resolve().parents[1] / "helm" / "loraplex" / "files" / "dashboards"


def write(folder: Path) -> None:
    """One file for each dashboard."""
    for board in (overview.BOARD, adapters_and_pool.BOARD, tenants.BOARD):
        text = json.dumps(board.model(), indent=1) + "\n"
        (folder / f"{board.name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
