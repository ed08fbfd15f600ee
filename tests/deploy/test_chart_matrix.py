"""Many combinations of values, and the examples: what the chart makes is what clusters of all versions take."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).resolve().parent
CHART = HERE.parents[1] / "deploy" / "helm" / "loraplex"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
NEWEST = VERSIONS[-1]
OWN_SCHEMAS = {"InferencePool": "inferencepool", "LeaderWorkerSet": "leaderworkerset"}
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
STRANGERS = {"LoraAdapter"}
"""Kinds in examples that others define and that no schema here knows."""

Values = dict[str, Any]

WORKLOADS: dict[str, Values] = {
    "deployment": {},
    "statefulset": {"workload": {"kind": "StatefulSet"}, "replicas": 3, "cache": {"type": "perPod"}},
    "leaderworkerset": {"workload": {"kind": "LeaderWorkerSet"}, "replicas": 2},
    "claims": {"state": {"type": "claim", "storageClass": "fast"}, "cache": {"type": "claim"}},
}
SOURCES: dict[str, Values] = {
    "demo": {"demo": True},
    "hub": {"model": {"hub": "org/base"}, "hubToken": {"secretName": "hub"}, "objectStore": {"secretName": "s3"}},
    "claim": {
        "model": {"name": "base", "claim": {"name": "models", "subPath": "base"}},
        "adapterFolder": {"claim": {"name": "adapters"}, "watch": True},
        "adapters": [{"name": "a", "path": "/adapters/a"}],
    },
}
AROUND: dict[str, Values] = {
    "bare": {
        "serviceAccount": {"create": False},
        "podDisruptionBudget": {"enabled": False},
        "test": {"enabled": False},
    },
    "gpu": {
        "gpu": {"count": 1},
        "runtimeClassName": "nvidia",
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "serving",
        "resources": {"limits": {"cpu": "8", "memory": "64Gi"}},
        "auth": {"secretName": "keys"},
    },
    "watched": {
        "monitoring": {"monitor": "ServiceMonitor", "rules": {"enabled": True}, "dashboards": {"enabled": True}},
        "networkPolicy": {
            "enabled": True,
            "from": [{"namespaceSelector": {"matchLabels": {"name": "gateway"}}}],
            "egress": {"enabled": True, "rules": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
        },
        "ingress": {"enabled": True, "hosts": [{"host": "a.example", "path": "/"}], "tls": [{"secretName": "tls"}]},
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
        "commonLabels": {"team": "a"},
        "podLabels": {"tier": "gpu"},
        "podAnnotations": {"a": "b"},
    },
    "routed": {
        "metricsCompat": "vllm",
        "inferencePool": {"enabled": True, "endpointPicker": {"name": "epp"}},
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gateway", "namespace": "gateways", "sectionName": "https"}],
            "hostnames": ["models.example"],
            "timeouts": {"request": "0s"},
        },
        "monitoring": {"monitor": "PodMonitor", "labels": {"release": "prometheus"}},
        "productionStack": {"enabled": True, "baseModel": "base"},
    },
}
SCALED: dict[str, Values] = {
    "hpa": {"autoscaling": {"type": "hpa", "hpa": {"adapterLoadsMetric": "loads"}}},
    "keda": {
        "autoscaling": {"type": "keda", "keda": {"serverAddress": "http://p", "authenticationRef": {"name": "a"}}}
    },
}


def cases() -> Iterator[tuple[str, Values]]:
    for workload, source, around in itertools.product(WORKLOADS, SOURCES, AROUND):
        yield f"{workload}-{source}-{around}", WORKLOADS[workload] | SOURCES[source] | AROUND[around]
    for workload, scaled in itertools.product(("deployment", "statefulset", "leaderworkerset"), SCALED):
        yield f"{workload}-{scaled}", SOURCES["demo"] | WORKLOADS[workload] | SCALED[scaled]
    yield "ephemeral", SOURCES["demo"] | {"cache": {"type": "ephemeral"}, "replicas": 2}
    yield "no-state", SOURCES["demo"] | {"state": {"type": "none"}, "preStopSeconds": 0}
    for name, path in EXAMPLES.items():
        yield f"example-{name}", yaml.safe_load(path.read_text(encoding="utf-8"))


CASES = dict(cases())


def cases_of(version: str) -> list[Values]:
    """All for the oldest and the newest version, the examples and a share of the rest for those between."""
    if version in (VERSIONS[0], NEWEST):
        return list(CASES.values())
    share = VERSIONS.index(version) % 4
    return [values for i, (name, values) in enumerate(CASES.items()) if i % 4 == share or name.startswith("example")]


@cache
def validator(kind: str, api_version: str, version: str) -> Any:
    """Kubernetes' schema in which unknown fields are faults."""
    import jsonschema
    from kubernetes_validate import utils
    from referencing import Registry, Resource

    group = api_version.split("/")[0].split(".")[0] + "-" if "/" in api_version else ""
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    name = f"{folder}/{kind.lower()}-{group}{api_version.rpartition('/')[2]}.json"
    registry: Any = Registry()
    for contents in (utils.schema_contents(name, version), definitions(folder, version)):
        registry = Resource.from_contents(contents) @ registry
    return jsonschema.Draft202012Validator(utils.schema_contents(name, version), registry=registry)


@cache
def definitions(folder: str, version: str) -> Any:
    from kubernetes_validate import utils

    return utils.schema_contents(f"{folder}/_definitions.json", version)


def faults(one: dict[str, Any], version: str) -> list[str]:
    where = f"{one['kind']} in {version}"
    found = validator(one["kind"], one["apiVersion"], version).iter_errors(one)
    return [f"{where}: {'/'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


def kubernetes_objects(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those that Kubernetes knows by itself, with the pods of those that it does not."""
    for one in objects:
        if one["kind"] == "LeaderWorkerSet":
            template = one["spec"]["leaderWorkerTemplate"]["workerTemplate"]
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": one["metadata"], "template": template}
        elif one["kind"] not in FOREIGN | set(OWN_SCHEMAS) | STRANGERS:
            yield one


@pytest.mark.parametrize("version", VERSIONS)
def test_clusters_of_every_version_take_all_objects(render: Any, version: str) -> None:
    pytest.importorskip("kubernetes_validate")
    seen: set[str] = set()
    told: list[str] = []
    of_version = cases_of(version)
    for values in of_version:
        for one in kubernetes_objects(render(values, f"{version}.0").objects):
            text = json.dumps({key: value for key, value in one.items() if key != "metadata"}, sort_keys=True)
            if text not in seen:
                seen.add(text)
                told += faults(one, version)
    assert len(seen) > len(of_version)
    assert not told


def test_a_misspelt_field_would_be_found(render: Any) -> None:
    pytest.importorskip("kubernetes_validate")
    workload = render({"demo": True}).workload
    workload["spec"]["template"]["spec"]["containers"][0]["lifecycl"] = {}
    (told,) = faults(workload, NEWEST)
    assert "lifecycl" in told


@pytest.mark.parametrize("kube", ["1.20.2", "1.25.0"])
def test_old_clusters_get_what_they_know(render: Any, kube: str) -> None:
    newer = {"sleep", "persistentVolumeClaimRetentionPolicy"} if kube == "1.20.2" else {"sleep"}
    for name, values in CASES.items():
        if kube == "1.20.2" and dict(values.get("cache", {})).get("type") == "ephemeral":
            continue
        text = json.dumps(render(values, kube).objects)
        assert not [word for word in newer if f'"{word}":' in text], name


@pytest.mark.parametrize("name", CASES)
def test_names_and_references_of_a_release_agree(render: Any, name: str) -> None:
    release = render(CASES[name])
    keys = [(one["kind"], one["metadata"]["name"]) for one in release.objects]
    assert len(set(keys)) == len(keys)
    config = release.volumes["config"]["configMap"]["name"]
    assert ("ConfigMap", config) in keys
    account = release.pod["serviceAccountName"]
    assert ("ServiceAccount", account) in keys or account == "default"
    ports = {port["name"] for port in release.container["ports"]}
    for service in release.all("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for volume in release.volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        assert claim is None or ("PersistentVolumeClaim", claim) in keys or not claim.startswith("lp-")


def test_resources_of_our_own_schemas_are_right(render: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    counts = dict.fromkeys(OWN_SCHEMAS, 0)
    for values in CASES.values():
        for one in render(values).objects:
            if one["kind"] in OWN_SCHEMAS:
                schema = json.loads((HERE / "crds" / f"{OWN_SCHEMAS[one['kind']]}.schema.json").read_text())
                jsonschema.Draft202012Validator(schema).validate(one)
                counts[one["kind"]] += 1
    assert all(counts.values()), counts


@pytest.fixture(scope="session")
def foreign_faults(require_tool: Callable[[str], str]) -> Callable[[list[Any]], list[list[str]]]:
    """Faults of objects by the models of the operators that read them."""
    node = require_tool("node")
    if not (HERE / "crds" / "node_modules").is_dir():
        reason = "run `npm ci --ignore-scripts` in tests/deploy/crds"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)

    def run(objects: list[Any]) -> list[list[str]]:
        done = subprocess.run(
            [node, "validate.mjs"],
            cwd=HERE / "crds",
            input=json.dumps(objects),
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    return run


def test_operators_take_their_resources(render: Any, foreign_faults: Any) -> None:
    objects = [one for values in CASES.values() for one in render(values).objects if one["kind"] in FOREIGN]
    assert {one["kind"] for one in objects} == FOREIGN
    assert not [told for told in foreign_faults(objects) if told]


def test_faults_of_operators_resources_would_be_found(render: Any, foreign_faults: Any) -> None:
    keda = render({"demo": True} | SCALED["keda"]).one("ScaledObject")
    keda["spec"]["triggers"][0]["metadata"]["threshold"] = 8
    monitor = render({"demo": True, "monitoring": {"monitor": "ServiceMonitor"}}).one("ServiceMonitor")
    monitor["spec"]["endpoints"][0]["intervall"] = "15s"
    (wrong_type,), (unknown,) = foreign_faults([keda, monitor])
    assert "threshold must be string" in wrong_type
    assert unknown == "/spec/endpoints/0/intervall is not known"
