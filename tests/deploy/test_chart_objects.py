"""What the chart makes beside the servers: routes, scaling, budgets, monitoring."""

from __future__ import annotations

from typing import Any

import pytest

DEMO: dict[str, Any] = {"demo": True}
POOL = {"metricsCompat": "vllm", "inferencePool": {"enabled": True, "endpointPicker": {"name": "epp"}}}


def test_a_pool_selects_the_servers_and_names_its_picker(render: Any) -> None:
    release = render(DEMO | POOL | {"containerPort": 9000})
    spec = release.one("InferencePool")["spec"]
    labels = release.template["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert labels["llm-d.ai/engine-type"] == "vllm"
    assert spec["targetPorts"] == [{"number": 9000}]
    assert spec["endpointPickerRef"] == {
        "group": "",
        "kind": "Service",
        "name": "epp",
        "port": {"number": 9002},
        "failureMode": "FailOpen",
    }
    assert release.config["metrics_compat"] == "vllm"


def test_a_route_leads_to_the_pool_where_there_is_one(render: Any) -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}], "timeouts": {"request": "0s"}}}
    (rule,) = render(DEMO | POOL | route).one("HTTPRoute")["spec"]["rules"]
    (pool,) = rule["backendRefs"]
    assert pool == {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "lp-loraplex"}
    assert rule["timeouts"] == {"request": "0s"}
    release = render(DEMO | route | {"service": {"port": 80}})
    (rule,) = release.one("HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": release.one("Service")["metadata"]["name"], "port": 80}]


def test_an_ingress_leads_to_the_service(render: Any) -> None:
    values = {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}], "className": "nginx"}}
    release = render(DEMO | values | {"service": {"portName": "web"}})
    (rule,) = release.one("Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    service = release.one("Service")
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] == service["spec"]["ports"][0]["name"] == "web"
    assert (rule["host"], path["path"]) == ("a.example", "/")


def test_llm_d_finds_servers_of_a_pool_that_is_not_ours(render: Any) -> None:
    release = render(DEMO | {"llmd": {"enabled": True}, "metricsCompat": "vllm"})
    assert release.template["metadata"]["labels"]["llm-d.ai/engine-type"] == "vllm"
    assert not release.all("InferencePool")
    assert "llm-d.ai/engine-type" not in render(DEMO).template["metadata"]["labels"]


@pytest.mark.parametrize(
    ("values", "base"),
    [
        (DEMO, "loraplex-demo"),
        ({"model": {"name": "llama", "path": "/x/y"}}, "llama"),
        ({"model": {"hub": "meta-llama/Llama-3.1-8B"}}, "Llama-3.1-8B"),
        ({"model": {"path": "/x/y"}, "productionStack": {"baseModel": "mine"}}, "mine"),
    ],
)
def test_production_stack_finds_servers_by_label_and_port_name(render: Any, values: dict[str, Any], base: str) -> None:
    stack = values.get("productionStack", {}) | {"enabled": True}
    release = render(values | {"productionStack": stack, "containerPort": 8080})
    assert release.template["metadata"]["labels"]["model"] == base
    assert release.container["ports"] == [{"name": "container-port", "containerPort": 8080, "protocol": "TCP"}]
    assert release.container["readinessProbe"]["httpGet"]["port"] == "container-port"
    assert release.one("Service")["spec"]["ports"][0]["targetPort"] == "container-port"


def test_scalers_scale_the_workload_which_then_sets_no_replicas(render: Any) -> None:
    for kind, api in (
        ("Deployment", "apps/v1"),
        ("StatefulSet", "apps/v1"),
        ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1"),
    ):
        for scaler, made in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
            keda = {"serverAddress": "http://prometheus:9090"}
            values = {"workload": {"kind": kind}, "autoscaling": {"type": scaler, "keda": keda}, "replicas": 7}
            release = render(DEMO | values)
            target = release.one(made)["spec"]["scaleTargetRef"]
            assert target == {"apiVersion": api, "kind": kind, "name": release.workload["metadata"]["name"]}
            assert "replicas" not in release.workload["spec"]
        assert render(DEMO | {"workload": {"kind": kind}, "replicas": 7}).workload["spec"]["replicas"] == 7


def test_the_autoscaler_aims_at_queue_and_adapter_pressure(render: Any) -> None:
    hpa = {"adapterLoadsMetric": "loraplex_adapter_loads_per_second"}
    auto = {"type": "hpa", "minReplicas": 2, "waitingPerReplica": 3, "adapterLoadsPerReplica": 1.5, "hpa": hpa}
    spec = render(DEMO | {"autoscaling": auto}).one("HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 4)
    aims = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in spec["metrics"]}
    assert aims == {"loraplex_requests_waiting": "3", "loraplex_adapter_loads_per_second": "1.5"}


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("Deployment", ["lp-loraplex-6f7d9c8b54-x2x9k"], ["lp-loraplex-b-0", "lp-loraplex-b-6f7d9c8b54-x2x9k"]),
        ("StatefulSet", ["lp-loraplex-0", "lp-loraplex-12"], ["lp-loraplex-b-0", "lp-loraplex-test"]),
    ],
)
def test_keda_asks_only_of_the_releases_own_pods(render: Any, kind: str, own: list[str], others: list[str]) -> None:
    import re

    keda = {"serverAddress": "http://prometheus:9090", "authenticationRef": {"name": "auth"}}
    values = {"workload": {"kind": kind}, "autoscaling": {"type": "keda", "keda": keda}}
    triggers = {one["name"]: one for one in render(DEMO | values).one("ScaledObject")["spec"]["triggers"]}
    assert set(triggers) == {"queue", "adapters"}
    for trigger in triggers.values():
        query = trigger["metadata"]["query"]
        assert 'namespace="models"' in query
        (pattern,) = re.findall(r'pod=~"([^"]+)"', query)
        assert all(re.fullmatch(pattern, pod) for pod in own)
        assert not any(re.fullmatch(pattern, pod) for pod in others)
        assert trigger["metadata"]["serverAddress"] == "http://prometheus:9090"
        assert trigger["authenticationRef"] == {"name": "auth"}
    assert triggers["queue"]["metadata"]["query"].startswith("sum(loraplex_requests_waiting{")
    assert "rate(loraplex_adapter_loads_total{" in triggers["adapters"]["metadata"]["query"]


def test_scalers_ask_for_metrics_that_the_server_has() -> None:
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "server" / "metrics.py").read_text(encoding="utf-8")
    assert '"loraplex_requests_waiting"' in text
    assert '"adapter_loads"' in text


def test_drains_of_nodes_are_never_blocked_by_default(render: Any) -> None:
    assert render(DEMO).one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    least = render(DEMO | {"podDisruptionBudget": {"minAvailable": "50%"}}).one("PodDisruptionBudget")["spec"]
    assert least["minAvailable"] == "50%"
    assert "maxUnavailable" not in least
    assert not render(DEMO | {"podDisruptionBudget": {"enabled": False}}).all("PodDisruptionBudget")


@pytest.mark.parametrize(
    ("kube", "policy", "autoscaling"),
    [
        ("1.20.2", "policy/v1beta1", "autoscaling/v2beta2"),
        ("1.22.0", "policy/v1", "autoscaling/v2beta2"),
        ("1.23.0", "policy/v1", "autoscaling/v2"),
        ("1.37.0", "policy/v1", "autoscaling/v2"),
    ],
)
def test_api_versions_are_those_of_the_cluster(render: Any, kube: str, policy: str, autoscaling: str) -> None:
    release = render(DEMO | {"autoscaling": {"type": "hpa"}}, kube)
    assert release.one("PodDisruptionBudget")["apiVersion"] == policy
    assert release.one("HorizontalPodAutoscaler")["apiVersion"] == autoscaling


def test_a_policy_lets_in_the_named_peers_and_the_test(render: Any) -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"name": "gateway"}}}]
    policy = {"enabled": True, "from": peers, "egress": {"enabled": True, "rules": [{"ports": [{"port": 443}]}]}}
    release = render(DEMO | {"networkPolicy": policy, "containerPort": 9000})
    spec = release.one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    (rule,) = spec["ingress"]
    assert rule["ports"] == [{"port": 9000, "protocol": "TCP"}]
    assert rule["from"][:-1] == peers
    test = release.one("Pod")["metadata"]["labels"]
    assert rule["from"][-1]["podSelector"]["matchLabels"].items() <= test.items()
    assert {port["port"] for one in spec["egress"] for port in one["ports"]} == {53, 443}
    everyone = render(DEMO | {"networkPolicy": {"enabled": True}}).one("NetworkPolicy")["spec"]
    assert "from" not in everyone["ingress"][0]


def test_rules_and_dashboards_are_sent_as_they_are(render: Any, chart_folder: Any) -> None:
    import json

    import yaml

    monitoring = {
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Serving"}},
    }
    release = render(DEMO | {"monitoring": monitoring})
    rules = [yaml.safe_load(path.read_text()) for path in sorted((chart_folder / "files" / "rules").glob("*.yaml"))]
    made = release.all("PrometheusRule")
    assert sorted(json.dumps(one["spec"], sort_keys=True) for one in made) == sorted(
        json.dumps(one, sort_keys=True) for one in rules
    )
    assert all(one["metadata"]["labels"]["release"] == "prometheus" for one in made)
    dashboards = sorted((chart_folder / "files" / "dashboards").glob("*.json"))
    boards = [one for one in release.all("ConfigMap") if "grafana_dashboard" in one["metadata"]["labels"]]
    assert rules
    assert dashboards
    assert {name: json.loads(text) for one in boards for name, text in one["data"].items()} == {
        path.name: json.loads(path.read_text()) for path in dashboards
    }
    assert all(one["metadata"]["labels"]["grafana_dashboard"] == "1" for one in boards)
    assert all(one["metadata"]["annotations"] == {"grafana_folder": "Serving"} for one in boards)


def test_more_objects_are_made_with_templates_filled_in(render: Any) -> None:
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}, "data": {"a": "1"}}
    text = 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: {{ include "loraplex.fullname" . }}-y\n'
    release = render(DEMO | {"extraObjects": [extra, text]})
    assert [one["metadata"]["name"] for one in release.objects if one.get("data") == {"a": "1"}] == ["lp-x"]
    assert release.one("Secret")["metadata"]["name"] == "lp-loraplex-y"


def test_containers_and_volumes_can_be_added(render: Any) -> None:
    sidecar = {"name": "lora-sidecar", "image": "example/sidecar:1"}
    values = {
        "sidecars": [sidecar],
        "initContainers": [sidecar | {"name": "fetch"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    }
    release = render(DEMO | values)
    assert [one["name"] for one in release.pod["containers"]] == ["loraplex", "lora-sidecar"]
    assert [one["name"] for one in release.pod["initContainers"]] == ["fetch"]
    assert release.volumes["more"] == {"name": "more", "emptyDir": {}}
    assert release.mounts["more"]["mountPath"] == "/more"


def test_notes_say_how_to_ask_and_what_is_open(render: Any) -> None:
    notes = render(DEMO | {"service": {"port": 80}}).notes
    assert "port-forward service/lp-loraplex 8000:80" in notes
    assert "set auth.secretName" in notes
    assert "forgotten with their pod" in notes
    guarded = render(DEMO | {"auth": {"secretName": "keys"}, "workload": {"kind": "StatefulSet"}}).notes
    assert "authorization: Bearer" in guarded
    assert "set auth.secretName" not in guarded
    assert "forgotten" not in guarded
