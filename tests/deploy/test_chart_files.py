"""The chart's own files: what is made from code is as the code is now, and everything passes the linters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex.server.settings import Settings
from loraplex.server.settings_schema import settings_schema

ROOT = Path(__file__).resolve().parents[2]
HELM = ROOT / "deploy" / "helm"
EXAMPLES = sorted((HELM / "loraplex" / "examples").glob("*.yaml"))


@pytest.mark.parametrize(
    ("what", "path"),
    [("schema", HELM / "loraplex" / "values.schema.json"), ("table", ROOT / "docs" / "helm-values.md")],
)
def test_what_is_made_from_the_values_is_up_to_date(what: str, path: Path) -> None:
    made = subprocess.run(
        [sys.executable, str(HELM / "values_schema.py"), what], capture_output=True, text=True, check=True
    )
    assert path.read_text(encoding="utf-8") == made.stdout, "run `make docs`"


def test_the_schema_of_settings_takes_their_defaults_and_refuses_others() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = settings_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    check = jsonschema.Draft7Validator(schema)
    assert set(schema["properties"]) == set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = None if field.is_required() else field.default
        value = list(default) if isinstance(default, tuple) else default
        assert check.is_valid({name: value}), name
        assert check.is_valid({name: None}), name
        assert not check.is_valid({name: {"no": "setting"}}) or field.annotation in (dict, Any), name
    assert check.is_valid({"pool_bytes": "8GiB", "max_body_bytes": 1 << 20})
    assert not check.is_valid({"pool_bytes": "a lot"})
    assert not check.is_valid({"colour": "red"})
    assert "port" not in settings_schema(without={"port"})["properties"]


def test_every_value_has_a_schema_and_every_schema_a_default() -> None:
    """What has no default is left out of `helm show values`, where users look."""
    schema = yaml.safe_load((HELM / "values.schema.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((HELM / "loraplex" / "values.yaml").read_text(encoding="utf-8"))

    def compare(properties: dict[str, Any], defaults: dict[str, Any], path: str) -> None:
        told = set(properties) | ({"config"} if not path else set())
        assert told - {"global"} == set(defaults), path
        for name, one in properties.items():
            if "properties" in one:
                compare(one["properties"], defaults[name], f"{path}{name}.")

    compare(schema["properties"], values, "")


@pytest.mark.parametrize("example", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_helm_lints_the_chart(chart_folder: Path, example: Path | None) -> None:
    helm = pytest.importorskip("helm_python")
    values = yaml.safe_load(example.read_text(encoding="utf-8")) if example else {"demo": True}
    report = helm.lint(str(chart_folder), values, strict=True)
    assert not report["errors"]
    assert not [message for message in report["messages"] if message["severity"] > 1]


def test_the_chart_is_packaged_with_its_examples(chart_folder: Path, tmp_path: Path) -> None:
    import tarfile

    helm = pytest.importorskip("helm_python")
    with tarfile.open(helm.package(str(chart_folder), destination=str(tmp_path))) as archive:
        names = set(archive.getnames())
    assert {f"loraplex/examples/{path.name}" for path in EXAMPLES} <= names
    assert {"loraplex/values.schema.json", "loraplex/templates/NOTES.txt"} <= names


def test_the_chart_and_the_project_have_one_version() -> None:
    import tomllib

    chart = yaml.safe_load((HELM / "loraplex" / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]


def yaml_files() -> list[Path]:
    folders = (ROOT / "deploy", ROOT / "tests" / "deploy")
    found = [path for folder in folders for end in ("*.yaml", "*.yml") for path in folder.rglob(end)]
    return sorted(path for path in found if not {"templates", "node_modules"} & set(path.parts))


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_linted(path: Path) -> None:
    pytest.importorskip("yamllint")
    from yamllint import linter
    from yamllint.config import YamlLintConfig

    config = YamlLintConfig(file=str(ROOT / "deploy" / ".yamllint.yaml"))
    with path.open(encoding="utf-8") as text:
        faults = [f"{fault.line}: {fault.desc}" for fault in linter.run(text, config)]
    assert not faults
