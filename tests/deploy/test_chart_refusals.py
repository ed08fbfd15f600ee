"""Values that the chart refuses, by its schema or for what cannot be had together; the message names the value."""

from __future__ import annotations

from typing import Any

import pytest

DEMO: dict[str, Any] = {"demo": True}
VLLM = {"metricsCompat": "vllm"}
STATEFUL = {"workload": {"kind": "StatefulSet"}}
CLAIM = {"state": {"type": "claim"}}

BY_SCHEMA = [
    ({"replica": 2}, "replica"),
    ({"replicas": -1}, "/replicas"),
    ({"replicas": "two"}, "/replicas"),
    ({"image": {"tag": "latest"}}, "/image/tag"),
    ({"image": {"digest": "abc"}}, "/image/digest"),
    ({"image": {"repo": "x"}}, "repo"),
    ({"model": {"name": "m", "image": {"reference": "registry/m:latest"}}}, "/model/image/reference"),
    ({"model": {"name": "m", "image": {"reference": "registry/m"}}}, "/model/image/reference"),
    ({"workload": {"kind": "DaemonSet"}}, "/workload/kind"),
    ({"workload": {"kind": "LeaderWorkerSet", "groupSize": 2}}, "/workload/groupSize"),
    ({"gpu": {"count": 2}}, "/gpu/count"),
    ({"config": {"pool_byte": 1}}, "pool_byte"),
    ({"config": {"pool_bytes": "lots"}}, "/config/pool_bytes"),
    ({"config": {"dtype": "int8"}}, "/config/dtype"),
    ({"config": {"memory_fraction": 1.5}}, "/config/memory_fraction"),
    ({"config": {"page_tokens": 0}}, "/config/page_tokens"),
    ({"config": {"prefetch": "yes"}}, "/config/prefetch"),
    ({"config": {"port": 80}}, "port"),
    ({"config": {"model": "m"}}, "model"),
    ({"config": {"state_dir": "/s"}}, "state_dir"),
    ({"adapters": [{"name": "a=b", "path": "/a"}]}, "/adapters/0/name"),
    ({"adapters": [{"name": "a"}]}, "/adapters/0"),
    ({"metricsCompat": "tgi"}, "/metricsCompat"),
    ({"state": {"type": "disk"}}, "/state/type"),
    ({"state": {"size": "ten"}}, "/state/size"),
    ({"stopMarginSeconds": 0}, "/stopMarginSeconds"),
    ({"containerPort": 70000}, "/containerPort"),
    ({"service": {"portName": "Port_Name"}}, "/service/portName"),
    ({"autoscaling": {"type": "hpa", "minReplicas": 0}}, "/autoscaling/minReplicas"),
    ({"monitoring": {"monitor": "Probe"}}, "/monitoring/monitor"),
    ({"probes": {"startup": {"budgetSeconds": 0}}}, "/probes/startup/budgetSeconds"),
    ({"inferencePool": {"endpointPicker": {"failureMode": "Open"}}}, "/inferencePool/endpointPicker/failureMode"),
]

TOGETHER = [
    ({"demo": False}, "model: set one of"),
    ({"demo": False, "model": {"hub": "a/b", "path": "/c"}}, "2 are set"),
    ({"demo": False, "model": {"claim": {"name": "c"}}}, "model.name"),
    ({"model": {"hub": "a/b"}}, "demo"),
    ({"adapterFolder": {"path": "/a"}}, "demo"),
    (
        {"demo": False, "model": {"hub": "a/b"}, "adapterFolder": {"path": "/a", "claim": {"name": "c"}}},
        "adapterFolder",
    ),
    ({"demo": False, "model": {"hub": "a/b"}, "adapterFolder": {"watch": True}}, "adapterFolder.watch"),
    ({"adapters": [{"name": "a", "path": "/1"}, {"name": "a", "path": "/2"}]}, "a is listed twice"),
    ({"state": {"type": "perPod"}}, "needs workload.kind StatefulSet"),
    (CLAIM | {"replicas": 2}, "up to 2 may run"),
    (CLAIM | STATEFUL | {"replicas": 2}, "up to 2 may run"),
    (CLAIM | {"autoscaling": {"type": "hpa", "maxReplicas": 3}}, "up to 3 may run"),
    (CLAIM | {"strategy": {"type": "RollingUpdate"}}, "Recreate"),
    ({"state": {"existingClaim": "c"}}, "state.existingClaim"),
    ({"cache": {"type": "perPod"}}, "cache.type"),
    ({"cache": {"type": "claim"}, "replicas": 2}, "ReadWriteMany"),
    ({"cache": {"existingClaim": "c"}}, "cache.existingClaim"),
    ({"cache": {"size": "10Gi"}}, "config.disk_cache_bytes"),
    ({"config": {"disk_cache_bytes": "41GiB"}}, "config.disk_cache_bytes"),
    ({"config": {"disk_cache_bytes": 50_000_000_000}}, "50000000000 bytes"),
    ({"auth": {"secretName": "s", "secretKey": ""}}, "auth.secretKey"),
    ({"auth": {"secretName": "s", "tenantsKey": "api-keys"}}, "auth.tenantsKey"),
    ({"auth": {"tenantsKey": "tenants"}}, "auth.secretName"),
    (STATEFUL | {"strategy": {"type": "Recreate"}}, "a StatefulSet takes RollingUpdate or OnDelete, not Recreate"),
    ({"gpu": {"count": 1}, "resourceClaims": [{"name": "g"}]}, "gpu.count"),
    ({"gpu": {"count": 1}, "config": {"device": "cpu"}}, "config.device"),
    ({"config": {"host": "127.0.0.1"}}, "config.host"),
    ({"autoscaling": {"type": "hpa", "minReplicas": 9}}, "autoscaling.minReplicas"),
    ({"autoscaling": {"type": "keda"}}, "autoscaling.keda.serverAddress"),
    ({"inferencePool": {"enabled": True, "endpointPicker": {"name": "epp"}}}, "metricsCompat"),
    ({"llmd": {"enabled": True}}, "metricsCompat"),
    (VLLM | {"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker.name"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    ({"productionStack": {"enabled": True, "baseModel": "meta/llama"}}, "productionStack.baseModel"),
]


@pytest.mark.parametrize(("values", "named"), BY_SCHEMA)
def test_the_schema_names_what_it_refuses(refuse: Any, values: dict[str, Any], named: str) -> None:
    told = refuse(DEMO | values)
    assert "schema" in told
    assert named in told


@pytest.mark.parametrize(("values", "named"), TOGETHER)
def test_what_cannot_be_had_together_is_told(refuse: Any, values: dict[str, Any], named: str) -> None:
    told = refuse(DEMO | values)
    assert "checks.yaml" in told
    assert named in told


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"demo": False, "model": {"name": "m", "image": {"reference": "r/m:1"}}}, "need Kubernetes 1.31"),
        ({"cache": {"type": "ephemeral"}}, "needs Kubernetes 1.21"),
        ({"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "t"}]}, "need Kubernetes 1.26"),
    ],
)
def test_what_an_old_cluster_lacks_is_told(refuse: Any, render: Any, values: dict[str, Any], named: str) -> None:
    assert named in refuse(DEMO | values, kube="1.20.2")
    render(DEMO | values, "1.33.0")


def test_what_may_be_had_together_is_not_refused(render: Any) -> None:
    for values in (
        {"cache": {"type": "claim", "accessModes": ["ReadWriteMany"]}, "replicas": 2},
        {"cache": {"size": "20Gi"}, "config": {"disk_cache_bytes": "20GiB"}},
        {"cache": {"size": "20G"}, "config": {"disk_cache_bytes": 20_000_000_000}},
        CLAIM | {"strategy": {"type": "Recreate"}},
        {"config": {"host": "::"}},
        {"global": {"of": "a parent chart"}},
    ):
        render(DEMO | values)


def test_a_chart_without_rules_says_so(refuse: Any, chart_folder: Any, tmp_path: Any) -> None:
    import shutil

    import helm_python

    bare = tmp_path / "loraplex"
    shutil.copytree(chart_folder, bare, ignore=shutil.ignore_patterns("files"))
    chart = helm_python.Chart.load(bare)
    for part, pattern in (("rules", "files/rules/*.yaml"), ("dashboards", "files/dashboards/*.json")):
        assert pattern in refuse(DEMO | {"monitoring": {part: {"enabled": True}}}, of=chart)
