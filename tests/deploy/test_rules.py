"""The alerts' rules: what Prometheus' own tool says of them, and that each has its tests and instructions."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "helm" / "loraplex" / "files" / "rules" / "loraplex.yaml"
TESTS = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
GUIDE = ROOT / "docs" / "alerts.md"
LABEL = re.compile(r'(\w+)="([^"]*)"')


GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}


@pytest.fixture(scope="module")
def checks() -> list[tuple[str, dict[str, dict[str, str]]]]:
    """Of each moment at which the tests look: the file, and the labels of the alerts that must fire then, by name."""
    found = []
    for file in TESTS:
        for test in yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["tests"]:
            for check in test["promql_expr_test"]:
                fired = [dict(LABEL.findall(sample["labels"])) for sample in check["exp_samples"]]
                found.append((file.name, {labels["alertname"]: labels for labels in fired}))
    return found


def test_promtool_finds_no_fault_with_the_rules(require_tool: Callable[[str], str]) -> None:
    done = subprocess.run([require_tool("promtool"), "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_must_and_are_silent_when_they_must_not(
    require_tool: Callable[[str], str], file: Path
) -> None:
    done = subprocess.run([require_tool("promtool"), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_seen_firing_and_silent(checks: Any) -> None:
    firing, looked = defaultdict(int), defaultdict(int)
    for file, fired in checks:
        looked[file] += 1
        for name in fired:
            firing[name, file] += 1
    assert {name for name, _ in firing} == set(ALERTS)
    always = [name for (name, file), times in firing.items() if times == looked[file]]
    assert not always


def test_annotations_name_only_labels_that_the_alert_has(checks: Any) -> None:
    missing = {
        (name, label)
        for _, fired in checks
        for name, labels in fired.items()
        for label in re.findall(r"\$labels\.(\w+)", str(ALERTS[name]["annotations"]))
        if label not in labels
    }
    assert not missing


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_how_bad_it_is_what_is_wrong_in_numbers_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert len(annotations["summary"]) <= 120
    assert re.search(r"\$value|\d", annotations["description"])
    assert annotations["runbook_url"] == f"docs/alerts.md#alert-{name.lower()}"


def test_the_guide_has_a_section_for_each_alert_in_their_order() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert re.findall(r"^## Alert (\w+)$", text, re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_each_section_of_the_guide_says_what_it_means_what_to_look_at_and_what_to_do(name: str) -> None:
    _, found, rest = GUIDE.read_text(encoding="utf-8").partition(f"## Alert {name}\n")
    assert found
    section = rest.partition("\n## ")[0]
    assert f"*{ALERTS[name]['labels']['severity']}*" in section
    for heading in ("Means:", "Look at:", "Do:"):
        assert section.count(f"\n**{heading}** ") == 1
