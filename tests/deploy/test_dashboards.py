"""The dashboards: made from their description, sound as Grafana reads them, with queries that Prometheus takes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("overview", "adapters-and-pool", "tenants")
RATES = {"reqps", "cps", "suffix: tok/s"}
UNITS = {"short", "s", "bytes", "percentunit", *RATES}


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(f"tests_deploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUERIES: Any = load_beside("dashboard_queries")
BOARDS: dict[str, Any] = QUERIES.boards()


@pytest.fixture(params=NAMES)
def board(request: pytest.FixtureRequest) -> Any:
    return BOARDS[request.param]


def panels(board: Any, *, rows: bool = False) -> list[Any]:
    return [panel for panel in board["panels"] if rows or panel["type"] != "row"]


def test_the_files_are_as_their_description_says(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "deploy" / "dashboards" / "write.py", tmp_path], check=True)
    written = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    committed = {file.name: file.read_text(encoding="utf-8") for file in QUERIES.DASHBOARDS.glob("*.json")}
    assert committed == written, "run `make dashboards`"
    assert set(committed) == {f"{name}.json" for name in NAMES}


def test_dashboards_can_be_told_apart_and_found() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len({board["title"] for board in BOARDS.values()}) == 3
    for board in BOARDS.values():
        assert re.fullmatch(r"loraplex-[a-z-]{1,30}", board["uid"])
        assert "loraplex" in board["tags"]
        assert "id" not in board, "Grafana gives ids itself"


def test_panels_have_ids_of_their_own_and_do_not_overlap(board: Any) -> None:
    all_panels = panels(board, rows=True)
    assert len({panel["id"] for panel in all_panels}) == len(all_panels)
    taken: set[tuple[int, int]] = set()
    for panel in all_panels:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells


def test_lines_are_full_and_rows_are_short(board: Any) -> None:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in board["panels"])
    assert area == 24 * height, "there are holes"
    kinds = [panel["type"] for panel in board["panels"]]
    assert kinds[0] == "row"
    rows = [len(list(group)) for is_row, group in itertools.groupby(kinds, lambda kind: kind == "row") if not is_row]
    assert max(rows) <= 8


def test_every_panel_says_what_it_shows_in_which_unit(board: Any) -> None:
    for panel in panels(board):
        assert panel["description"].endswith(".")
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS
        steps = defaults["thresholds"]["steps"]
        assert steps[0]["value"] is None
        values = [step["value"] for step in steps[1:]]
        assert values == sorted(values)
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["legendFormat"]
            assert target["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_query_is_of_the_chosen_servers_and_legends_name_labels_that_are_there(board: Any) -> None:
    for panel in panels(board):
        for target in panel["targets"]:
            expr = target["expr"]
            for selector in re.findall(r"\{[^{}]*\}", expr):
                assert {"$namespace", "$job"} <= set(re.findall(r"\$\w+", selector)), expr
            assert not re.search(r"loraplex_\w+(?![\w{:])", expr.replace("namespace_job:loraplex_", "")), expr
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", expr) or "sum" not in expr, (panel["title"], label)


def test_counters_are_never_shown_as_they_are(board: Any) -> None:
    for panel in panels(board):
        for target in panel["targets"]:
            for name in re.findall(r"(\w+\() *loraplex_\w+(?:_total|_count|_bucket)\{", target["expr"]):
                assert name in {"rate(", "increase("}, target["expr"]


def test_growth_each_second_has_a_unit_that_says_so(board: Any) -> None:
    for panel in panels(board):
        growths = {
            "rate(" in target["expr"] and "histogram_quantile" not in target["expr"] and " / (" not in target["expr"]
            for target in panel["targets"]
        }
        assert growths == {panel["fieldConfig"]["defaults"]["unit"] in RATES}, panel["title"]


def test_variables_come_before_those_that_need_them(board: Any) -> None:
    known: set[str] = set()
    for variable in board["templating"]["list"]:
        text = json.dumps({key: value for key, value in variable.items() if key not in {"current", "datasource"}})
        assert set(re.findall(r"\$(\w+)", text)) <= known
        known.add(variable["name"])
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(board["panels"])))
    assert used <= known
    assert known >= {"datasource", "namespace", "job", "instance"}


def test_promtool_can_parse_every_query(require_tool: Callable[[str], str], tmp_path: Path) -> None:
    exprs = [target.expr for target in QUERIES.targets()]
    exprs += [one["expr"] for board in BOARDS.values() for one in board["annotations"]["list"]]
    rules = [{"record": f"query_{at}", "expr": QUERIES.substituted(expr, 60)} for at, expr in enumerate(exprs)]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run([require_tool("promtool"), "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_query_has_an_answer_from_a_server_under_load(require_tool: Callable[[str], str]) -> None:
    require_tool("prometheus")
    script = Path(__file__).with_name("dashboard_check.py")
    done = subprocess.run([sys.executable, script, "--seconds", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
