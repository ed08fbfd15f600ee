"""The manifests and names in docs/routing.md are what they should be: of the right shape, of one mind, and ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from loraplex.server.settings import Settings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MANIFESTS: list[dict[str, Any]] = [document for block in BLOCKS for document in yaml.safe_load_all(block)]
Name = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)
Port = Field(ge=1, le=65535)
LabelValue = str


class Strict(BaseModel):
    """What a resource definition allows, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str = Name
    labels: dict[str, LabelValue] = {}


class Selector(Strict):
    matchLabels: dict[str, LabelValue] = Field(min_length=1, max_length=64)  # noqa: N815


class Number(Strict):
    number: int = Port


class PickerRef(Strict):
    name: str = Name
    port: Number
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"  # noqa: N815


class PoolSpec(Strict):
    selector: Selector
    targetPorts: list[Number] = Field(min_length=1, max_length=8)  # noqa: N815
    endpointPickerRef: PickerRef  # noqa: N815


class InferencePool(Strict):
    apiVersion: Literal["inference.networking.k8s.io/v1"]  # noqa: N815
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: PoolSpec


class Reference(Strict):
    group: str
    kind: str
    name: str = Name


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str = Field(pattern="^/")


class RouteMatch(Strict):
    path: PathMatch


class Timeouts(Strict):
    request: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class RouteRule(Strict):
    matches: list[RouteMatch]
    backendRefs: list[Reference]  # noqa: N815
    timeouts: Timeouts


class RouteSpec(Strict):
    parentRefs: list[Reference]  # noqa: N815
    rules: list[RouteRule]


class HTTPRoute(Strict):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]  # noqa: N815
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: RouteSpec


class ObjectiveSpec(Strict):
    priority: int
    poolRef: Reference  # noqa: N815


class InferenceObjective(Strict):
    apiVersion: Literal["inference.networking.x-k8s.io/v1alpha2"]  # noqa: N815
    kind: Literal["InferenceObjective"]
    metadata: Metadata
    spec: ObjectiveSpec


class Plugin(Strict):
    type: Literal[
        "lora-affinity-scorer",
        "queue-scorer",
        "kv-cache-utilization-scorer",
        "prefix-cache-scorer",
        "max-score-picker",
        "single-profile-handler",
    ]


class PluginUse(Strict):
    pluginRef: str  # noqa: N815
    weight: int | None = None


class Profile(Strict):
    name: str
    plugins: list[PluginUse]


class EndpointPickerConfig(Strict):
    apiVersion: Literal["inference.networking.x-k8s.io/v1alpha1"]  # noqa: N815
    kind: Literal["EndpointPickerConfig"]
    plugins: list[Plugin]
    schedulingProfiles: list[Profile]  # noqa: N815


class ConfigMap(Strict):
    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class AdapterSource(Strict):
    type: Literal["local", "s3", "http", "huggingface"]
    adapterName: str  # noqa: N815
    adapterPath: str  # noqa: N815


class Placement(Strict):
    algorithm: Literal["default", "ordered", "equalized"]
    replicas: int = Field(ge=0)


class LoraAdapterSpec(Strict):
    baseModel: str  # noqa: N815
    adapterSource: AdapterSource  # noqa: N815
    loraAdapterDeploymentConfig: Placement  # noqa: N815


class LoraAdapter(Strict):
    apiVersion: Literal["production-stack.vllm.ai/v1alpha1"]  # noqa: N815
    kind: Literal["LoraAdapter"]
    metadata: Metadata
    spec: LoraAdapterSpec


SHAPES: dict[str, type[Strict]] = {
    "InferencePool": InferencePool,
    "HTTPRoute": HTTPRoute,
    "InferenceObjective": InferenceObjective,
    "EndpointPickerConfig": EndpointPickerConfig,
    "ConfigMap": ConfigMap,
    "LoraAdapter": LoraAdapter,
}


def manifest(kind: str) -> dict[str, Any]:
    [found] = [one for one in MANIFESTS if one["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    return dict(manifest("Deployment")["spec"]["template"])


def container() -> dict[str, Any]:
    [found] = pod()["spec"]["containers"]
    return dict(found)


def test_each_kind_is_there_once() -> None:
    assert sorted(one["kind"] for one in MANIFESTS) == sorted([*SHAPES, "Deployment"])


@pytest.mark.parametrize("kind", SHAPES)
def test_a_manifest_has_the_shape_of_its_kind(kind: str) -> None:
    SHAPES[kind].model_validate(manifest(kind))


def test_the_manifests_refer_to_one_another() -> None:
    deployment, pool = manifest("Deployment"), manifest("InferencePool")
    labels = pod()["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"], pool["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    [port] = container()["ports"]
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    refs = [
        *manifest("HTTPRoute")["spec"]["rules"][0]["backendRefs"],
        manifest("InferenceObjective")["spec"]["poolRef"],
    ]
    group = pool["apiVersion"].partition("/")[0]
    assert refs == [{"group": group, "kind": "InferencePool", "name": pool["metadata"]["name"]}] * 2


def test_the_pods_are_what_the_operator_and_the_picker_look_for() -> None:
    labels, spec = pod()["metadata"]["labels"], manifest("LoraAdapter")["spec"]
    assert labels["model"] == spec["baseModel"]
    assert labels["llm-d.ai/engine-type"] == "vllm"
    assert container()["ports"][0]["name"] == "container-port"
    assert f"--served-model-name={spec['baseModel']}" in container()["args"]
    assert spec["loraAdapterDeploymentConfig"]["replicas"] <= manifest("Deployment")["spec"]["replicas"]


def test_the_arguments_are_settings_with_values_that_are_accepted() -> None:
    command, model, *flags = container()["args"]
    assert command == "serve"
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    settings = Settings(model=model, **{name.replace("-", "_"): value for name, value in given.items()})
    assert settings.http_config().metrics_compat == "vllm"
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert {str(settings.adapters), str(Path(model).parent)} <= mounts
    volumes = {volume["name"] for volume in pod()["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes


def test_the_picker_uses_the_plugins_that_it_declares() -> None:
    config = EndpointPickerConfig.model_validate(manifest("EndpointPickerConfig"))
    [profile] = config.schedulingProfiles
    used = {use.pluginRef: use.weight for use in profile.plugins}
    assert used.keys() | {"single-profile-handler"} == {plugin.type for plugin in config.plugins}
    scorers = {name: weight for name, weight in used.items() if name.endswith("scorer")}
    assert max(scorers, key=lambda name: scorers[name] or 0) == "lora-affinity-scorer"


def test_the_sidecars_configuration_is_one() -> None:
    text = manifest("ConfigMap")["data"]["configmap.yaml"]
    config = yaml.safe_load(text)["vLLMLoRAConfig"]
    assert config["defaultBaseModel"] == manifest("LoraAdapter")["spec"]["baseModel"]
    assert config["port"] == container()["ports"][0]["containerPort"]
    exist, gone = (config[which]["models"] for which in ("ensureExist", "ensureNotExist"))
    assert exist
    assert all(one.keys() == {"id", "source"} for one in exist + gone)
    assert not {one["id"] for one in exist} & {one["id"] for one in gone}


def test_probes_and_metrics_of_the_page_are_there(replica: Any) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check = container()[probe]["httpGet"]
        assert check["port"] == "container-port"
        assert replica.call("GET", check["path"]).status_code == 200
    served = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(replica.call("GET", "/metrics").text)
    }
    rows = "\n".join(re.findall(r"^\| (`vllm:.*?) \|", PAGE, re.MULTILINE))
    documented = set(re.findall(r"`(vllm:\w+)`", rows))
    assert documented == {name for name in served if name.startswith("vllm:")}
    assert "loraplex_slo_requests_total" in served
