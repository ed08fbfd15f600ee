"""Asks a Prometheus every query of the dashboards, and wants an answer with finite numbers to each.

    python tests/deploy/dashboard_queries.py http://127.0.0.1:9090 --seconds 15

It must have the rules, and have scraped a server under load for so long (``dashboard_load.py``), every second or so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

FILES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "loraplex" / "files"
DASHBOARDS = FILES / "dashboards"
RULES = FILES / "rules" / "loraplex.yaml"
OURS = re.compile(r"(?<![\w:])loraplex_\w+")
VARIABLE = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")
SLACK_SECONDS = 30
"""Shown before the load as well, which is of no harm, should it have ended a while ago."""

MAY_BE_EMPTY = ("namespace",)
"""Variables whose label only clusters have."""


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a dashboard, with what stands in it for variables."""

    board: str
    panel: str
    expr: str
    instant: bool


def boards(folder: Path = DASHBOARDS) -> dict[str, Any]:
    """The dashboards by the names of their files."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def targets(folder: Path = DASHBOARDS) -> Iterator[Target]:
    """All queries of all panels, as they are written."""
    for name, board in boards(folder).items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield Target(name, panel["title"], target["expr"], target["instant"])


def substituted(expr: str, seconds: int) -> str:
    """A query as Grafana sends it with all servers chosen and ``seconds`` shown."""
    expr = expr.replace("$__rate_interval", f"{min(seconds, 10)}s").replace("$__range", f"{seconds}s")
    return re.sub(r"\$\w+", ".*", expr)


def metric_names(texts: Iterable[str]) -> set[str]:
    """Names of metrics of ours, without those that the rules record."""
    return {name for text in texts for name in OURS.findall(text)}


class Prometheus:
    """The HTTP API of one."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer; ValueError for an error."""
        body = httpx2.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=30).json()
        if body["status"] != "success":
            raise ValueError(f"{body['errorType']}: {body['error']}")
        return body["data"]

    def values(self, expr: str, end: float, seconds: int, *, instant: bool) -> list[float]:
        """All numbers of the answer: those at the end, or of each of the seconds before."""
        if instant:
            return [float(series["value"][1]) for series in self.get("query", query=expr, time=end)["result"]]
        data = self.get("query_range", query=expr, start=end - seconds, end=end, step=1)
        return [float(value) for series in data["result"] for _, value in series["values"]]


def problems(url: str, seconds: int, folder: Path = DASHBOARDS, rules: Path = RULES) -> list[str]:
    """What is wrong with the answers, in words. Where nothing happened there may be NaN, but not everywhere."""
    prometheus = Prometheus(url)
    end, shown = time.time(), seconds + SLACK_SECONDS
    found = []
    for target in targets(folder):
        where = f"{target.board} / {target.panel}: {target.expr}"
        try:
            values = prometheus.values(substituted(target.expr, shown), end, shown, instant=target.instant)
        except ValueError as error:
            found.append(f"{where}: {error}")
            continue
        if not any(map(math.isfinite, values)):
            found.append(f"{where}: {'no number but NaN' if values else 'no answer'}")
        elif any(map(math.isinf, values)):
            found.append(f"{where}: infinite")
    return [*found, *_variable_problems(prometheus, folder), *_name_problems(prometheus, folder, rules)]


def _variable_problems(prometheus: Prometheus, folder: Path) -> Iterator[str]:
    for name, board in boards(folder).items():
        for variable in board["templating"]["list"]:
            if variable["type"] != "query" or variable["name"] in MAY_BE_EMPTY:
                continue
            query = VARIABLE.fullmatch(variable["definition"])
            assert query is not None, variable["definition"]
            match = substituted(query["series"], 0)
            if not prometheus.get(f"label/{query['label']}/values", **{"match[]": match}):
                yield f"{name}: variable {variable['name']} has no values"


def _name_problems(prometheus: Prometheus, folder: Path, rules: Path) -> Iterator[str]:
    """Names that no server exposes: misspelt ones would make alerts silent for ever."""
    known = set(prometheus.get("label/__name__/values"))
    asked = metric_names((rules.read_text(encoding="utf-8"), *(target.expr for target in targets(folder))))
    for name in sorted(asked - known):
        yield f"no server has {name}"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Ask a Prometheus every query of the dashboards.")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=int, default=15, help="how long it has scraped a server under load")
    parser.add_argument("--dashboards", type=Path, default=DASHBOARDS)
    parser.add_argument("--rules", type=Path, default=RULES)
    arguments = parser.parse_args()
    found = problems(arguments.url, arguments.seconds, arguments.dashboards, arguments.rules)
    for problem in found:
        print(problem)
    print(f"{len(list(targets(arguments.dashboards)))} queries, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
