"""The pods that the chart makes: who they are, what they may do, and how they start and stop."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from starlette.routing import Route

from loraplex.server.routes_health import health_routes
from loraplex.server.settings import Settings

DEMO = {"demo": True}
KINDS = ("Deployment", "StatefulSet", "LeaderWorkerSet")


def of_kind(kind: str, **values: Any) -> dict[str, Any]:
    return DEMO | {"workload": {"kind": kind}} | values


def seconds_after_which_all_has_ended(release: Any) -> float:
    hook = release.container["lifecycle"]["preStop"]
    pause = hook["sleep"]["seconds"] if "sleep" in hook else int(hook["exec"]["command"][1])
    return pause + release.config["linger_seconds"] + release.config["drain_seconds"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("linger", "drain"), [(0, 0), (20, 0.5), (5, 45), (30, 3600)])
@pytest.mark.parametrize("kube", ["1.20.2", "1.29.0", "1.33.0"])
def test_pods_are_given_longer_to_stop_than_they_take(
    render: Any, kind: str, linger: float, drain: float, kube: str
) -> None:
    config = {"drain_seconds": drain, "linger_seconds": linger}
    release = render(of_kind(kind, config=config, preStopSeconds=7), kube)
    assert release.pod["terminationGracePeriodSeconds"] >= seconds_after_which_all_has_ended(release) + 5


def test_a_drain_that_is_left_to_the_server_counts_by_its_default(render: Any) -> None:
    release = render(DEMO | {"config": {"drain_seconds": None, "linger_seconds": None}})
    default = Settings.model_fields["drain_seconds"].default
    assert not {"drain_seconds", "linger_seconds"} & release.config.keys()
    assert release.pod["terminationGracePeriodSeconds"] == default + 5 + 15


def test_only_a_new_kubelet_is_asked_to_sleep(render: Any) -> None:
    assert render(DEMO, "1.30.0").container["lifecycle"]["preStop"] == {"sleep": {"seconds": 5}}
    old = render(DEMO, "1.29.9").container["lifecycle"]["preStop"]
    assert old == {"exec": {"command": ["sleep", "5"]}}
    assert "lifecycle" not in render(DEMO | {"preStopSeconds": 0}).container


@pytest.mark.parametrize("kind", KINDS)
def test_pods_meet_the_restricted_standard(render: Any, kind: str) -> None:
    release = render(of_kind(kind))
    pods = [release.pod, release.one("Pod")["spec"]]
    for pod in pods:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    assert release.one("ServiceAccount")["automountServiceAccountToken"] is False


def test_a_service_of_the_servers_name_does_not_become_settings(render: Any) -> None:
    """Kubernetes would set LORAPLEX_PORT=tcp://..., which the server takes for its setting and refuses."""
    for name in ("loraplex", "lp"):
        release = render(DEMO, name=name)
        assert release.pod["enableServiceLinks"] is False
        assert release.one("Pod")["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_probes_ask_paths_that_the_server_answers_at_its_port(render: Any, kind: str) -> None:
    answered = {route.path for route in health_routes(Mock()).routes if isinstance(route, Route)}
    release = render(of_kind(kind, containerPort=9000, containerPortName="api"))
    (port,) = release.container["ports"]
    assert (port["name"], port["containerPort"], release.config["port"]) == ("api", 9000, 9000)
    paths = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = release.container[name]["httpGet"]
        assert get["port"] == "api"
        paths[name] = get["path"]
    assert set(paths.values()) <= answered
    assert paths["startupProbe"] == paths["readinessProbe"] == "/readyz"
    assert paths["livenessProbe"] == "/livez"


@pytest.mark.parametrize(("budget", "period"), [(900, 5), (901, 10), (30, 7)])
def test_a_start_may_take_its_budget(render: Any, budget: int, period: int) -> None:
    release = render(DEMO | {"probes": {"startup": {"budgetSeconds": budget, "periodSeconds": period}}})
    probe = release.container["startupProbe"]
    assert budget <= probe["periodSeconds"] * probe["failureThreshold"] < budget + period
    assert release.workload["spec"]["progressDeadlineSeconds"] > budget


@pytest.mark.parametrize("kind", KINDS)
def test_selectors_find_the_servers_and_nothing_else(render: Any, kind: str) -> None:
    release = render(of_kind(kind, networkPolicy={"enabled": True}, monitoring={"monitor": "PodMonitor"}))
    labels = release.template["metadata"]["labels"]
    (test,) = release.all("Pod")
    selectors = [service["spec"]["selector"] for service in release.all("Service")]
    selectors += [
        release.one(kind)["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget", "PodMonitor")
    ]
    selectors += [release.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    if kind != "LeaderWorkerSet":
        selectors += [release.workload["spec"]["selector"]["matchLabels"]]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= test["metadata"]["labels"].items()
        assert "app.kubernetes.io/version" not in selector, "a selector can never be changed"


def test_the_monitor_finds_one_service_and_its_port(render: Any) -> None:
    values = of_kind("StatefulSet", monitoring={"monitor": "ServiceMonitor"}, service={"portName": "web"})
    release = render(values)
    spec = release.one("ServiceMonitor")["spec"]
    found = [
        service
        for service in release.all("Service")
        if spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert len(found) == 1, "a pod that two services show is scraped twice"
    assert [endpoint["port"] for endpoint in spec["endpoints"]] == ["web"]
    assert spec["endpoints"][0]["path"] == "/metrics"


def test_every_object_says_whose_it_is(render: Any) -> None:
    release = render(of_kind("StatefulSet", commonLabels={"team": "a"}, cache={"type": "claim"}))
    for one in release.objects:
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "loraplex"
        assert labels["app.kubernetes.io/instance"] == "lp"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"] == "0.1.0"
        assert labels["team"] == "a"


def test_two_releases_share_no_name_and_no_pod(render: Any) -> None:
    one, other = render(DEMO, name="a"), render(DEMO, name="b")
    names = [{(obj["kind"], obj["metadata"]["name"]) for obj in release.objects} for release in (one, other)]
    assert not names[0] & names[1]
    selector = one.one("Service")["spec"]["selector"]
    assert not selector.items() <= other.template["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["r" * 53, "a-loraplex-" + "b" * 42])
def test_long_names_stay_names(render: Any, name: str) -> None:
    release = render(of_kind("StatefulSet", monitoring={"rules": {"enabled": True}}), name=name)
    for one in release.objects:
        assert len(one["metadata"]["name"]) <= 63
        assert all(len(str(value)) <= 63 for value in one["metadata"]["labels"].values())


def test_pods_are_made_anew_when_their_settings_change(render: Any) -> None:
    def checksum(**config: Any) -> str:
        return render(DEMO | {"config": config}).template["metadata"]["annotations"]["checksum/config"]

    assert checksum(max_running=3) == checksum(max_running=3)
    assert checksum(max_running=3) != checksum(max_running=4)


def test_images_go_by_version_tag_or_digest(render: Any) -> None:
    digest = "sha256:" + "a" * 64
    assert render(DEMO).container["image"] == "loraplex:0.1.0"
    image = {"repository": "registry:5000/x/loraplex", "tag": "0.1.0-cuda", "pullSecrets": ["reg"]}
    release = render(DEMO | {"image": image})
    assert release.container["image"] == "registry:5000/x/loraplex:0.1.0-cuda"
    assert release.pod["imagePullSecrets"] == [{"name": "reg"}]
    assert render(DEMO | {"image": image | {"digest": digest}}).container["image"].endswith(f"/loraplex@{digest}")


def test_gpus_are_limits_and_make_the_device(render: Any) -> None:
    values = {
        "gpu": {"count": 1, "resource": "nvidia.com/mig-3g.40gb"},
        "resources": {"limits": {"memory": "64Gi"}},
        "runtimeClassName": "nvidia",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }
    release = render(DEMO | values)
    assert release.container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/mig-3g.40gb": 1}
    assert release.pod["runtimeClassName"] == "nvidia"
    assert release.pod["tolerations"] == values["tolerations"]
    assert release.config["device"] == "cuda"
    assert "device" not in render(DEMO).config


def test_a_gpu_may_be_claimed(render: Any) -> None:
    claims = [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    release = render(DEMO | {"resourceClaims": claims}, "1.34.0")
    assert release.pod["resourceClaims"] == claims
    assert release.container["resources"]["claims"] == [{"name": "gpu"}]
    assert release.config["device"] == "cuda"


def test_a_limit_of_cpus_limits_the_threads(render: Any) -> None:
    limited = {"resources": {"limits": {"cpu": 4}}}
    threads = render(DEMO | limited).env["LORAPLEX_THREADS"]
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert "LORAPLEX_THREADS" not in render(DEMO | limited | {"config": {"threads": 2}}).env
    assert "LORAPLEX_THREADS" not in render(DEMO).env


def test_updates_take_no_second_gpu(render: Any) -> None:
    assert render(DEMO).workload["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    surge = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert render(DEMO | {"strategy": surge}).workload["spec"]["strategy"] == surge
    rollout = render(of_kind("LeaderWorkerSet")).workload["spec"]["rolloutStrategy"]
    assert rollout["rollingUpdateConfiguration"] == {"maxUnavailable": 1, "maxSurge": 0}


def test_the_test_pod_asks_for_adapters_with_a_key(render: Any) -> None:
    release = render(DEMO | {"auth": {"secretName": "keys", "secretKey": "mine"}, "service": {"port": 80}})
    test = release.one("Pod")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = test["spec"]["containers"]
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["LORAPLEX_URL"]["value"] == "http://lp-loraplex:80"
    assert env["KEYS"]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "mine"}
    assert container["image"] == release.container["image"]
    assert not render(DEMO | {"test": {"enabled": False}}).all("Pod")
