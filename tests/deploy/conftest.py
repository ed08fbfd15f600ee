"""What tests of the deployment share: tools of the machine, which users may lack and CI must have, and renderings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "loraplex"


def find_tool(name: str) -> str:
    """Path of a program. Without it the test is skipped, or fails where the variable CI is "true"."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """``require_tool("promtool")``: path of a program. Without it the test is skipped, or fails where CI is "true"."""
    return find_tool


class Release:
    """What Helm would send to a cluster."""

    def __init__(self, objects: list[dict[str, Any]], notes: str) -> None:
        self.objects, self.notes = objects, notes

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.objects if one["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = self.all(kind)
        return found

    @cached_property
    def workload(self) -> dict[str, Any]:
        (found,) = [one for kind in ("Deployment", "StatefulSet", "LeaderWorkerSet") for one in self.all(kind)]
        return found

    @property
    def template(self) -> dict[str, Any]:
        """The servers' pod template."""
        spec = self.workload["spec"]
        return spec["leaderWorkerTemplate"]["workerTemplate"] if "leaderWorkerTemplate" in spec else spec["template"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        return next(one for one in self.pod["containers"] if one["name"] == "loraplex")

    @property
    def config(self) -> dict[str, Any]:
        """The file of settings."""
        return yaml.safe_load(self.config_text)

    @property
    def config_text(self) -> str:
        return next(one for one in self.all("ConfigMap") if "config.yaml" in one["data"])["data"]["config.yaml"]

    @property
    def volumes(self) -> dict[str, dict[str, Any]]:
        return {volume["name"]: volume for volume in self.pod["volumes"]}

    @property
    def mounts(self) -> dict[str, dict[str, Any]]:
        return {mount["name"]: mount for mount in self.container["volumeMounts"]}

    @property
    def env(self) -> dict[str, dict[str, Any]]:
        return {variable["name"]: variable for variable in self.container["env"]}


@pytest.fixture(scope="session")
def chart_folder() -> Path:
    """The chart, as it lies in the repository."""
    return CHART


@pytest.fixture(scope="session")
def render(chart_folder: Path) -> Callable[..., Release]:
    """``render({"demo": True}, kube="1.20.2", name="lp")``: a Release; Helm's errors are raised."""
    helm = pytest.importorskip("helm_python")
    chart = helm.Chart.load(chart_folder)
    made: dict[tuple[int, str, str], tuple[str, str]] = {}

    def render(
        values: dict[str, Any], kube: str = "1.33.0", name: str = "lp", namespace: str = "models", of: Any = chart
    ) -> Release:
        options = {"name": name, "namespace": namespace, "kube_version": f"v{kube}", "strict": True}
        key = (id(of), json.dumps(values), json.dumps(options))
        if key not in made:
            # The library's own render() does not pass the version on.
            texts = json.loads(helm._native.call_string("helm_render", of._raw(), *key[1:]))
            manifests = [text for path, text in texts.items() if not path.endswith("NOTES.txt")]
            notes = next(text for path, text in texts.items() if path.endswith("NOTES.txt"))
            made[key] = json.dumps([one for text in manifests for one in _documents(text)]), notes
        objects, notes = made[key]
        return Release(json.loads(objects), notes)

    return render


class _NoTwins(yaml.CSafeLoader):
    """Refuses a key that is given twice, of which a cluster would take either."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twins = {key for key in keys if keys.count(key) > 1}
        assert not twins, f"{sorted(twins)} twice{node.start_mark}"
        return super().construct_mapping(node, deep)


def _documents(text: str) -> Iterable[dict[str, Any]]:
    return (one for one in yaml.load_all(text, _NoTwins) if one is not None)


@pytest.fixture
def refuse(render: Callable[..., Release]) -> Callable[..., str]:
    """``refuse({"replicas": -1})``: what Helm says against values."""
    helm = pytest.importorskip("helm_python")

    def refuse(values: dict[str, Any], **options: Any) -> str:
        with pytest.raises(helm.HelmError) as caught:
            render(values, **options)
        return str(caught.value)

    return refuse
