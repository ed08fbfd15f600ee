"""The file of settings that the chart writes, as the server reads it, and where secrets and data are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.settings import Settings, load_settings
from loraplex.server.settings_schema import secret_settings

DEMO = {"demo": True}
MODEL = {"name": "base", "path": "/models/base"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], Settings]:
    """What the server makes of a release: of its file, and of the plain variables of its container."""
    for name in os.environ:
        if name.upper().startswith("LORAPLEX_"):
            monkeypatch.delenv(name)

    def read(release: Any) -> Settings:
        command, flag, path = release.container["args"]
        assert (flag, path) == ("--config", "/etc/loraplex/config.yaml")
        file = tmp_path / "config.yaml"
        text = release.config_text
        if "metrics_compat" not in Settings.model_fields:
            text = "".join(line for line in text.splitlines(True) if not line.startswith("metrics_compat:"))
        file.write_text(text, encoding="utf-8")
        return load_settings({"model": "demo"} if command == "demo" else {}, file)

    return read


def test_the_server_takes_the_file(render: Any, read: Any) -> None:
    config = {
        "pool_bytes": 8589934592,
        "host_adapter_bytes": "12GiB",
        "memory_fraction": 0.75,
        "max_batch_tokens": 1048576,
        "adapter_sources": ["s3://bucket/adapters/", "hf://organisation/"],
        "watch_seconds": 1.5,
        "prefetch": False,
    }
    adapters = [{"name": "a", "path": "/a"}, {"name": "b", "path": "s3://bucket/adapters/b"}]
    release = render({"model": MODEL, "adapters": adapters, "config": config, "metricsCompat": "vllm"})
    settings = read(release)
    assert (settings.model, settings.model_name) == ("/models/base", "base")
    assert settings.named_adapters == {"a": "/a", "b": "s3://bucket/adapters/b"}
    assert (settings.pool_bytes, settings.host_adapter_bytes) == (8 << 30, 12 << 30)
    assert (settings.memory_fraction, settings.max_batch_tokens) == (0.75, 1 << 20)
    assert (settings.watch_seconds, settings.prefetch) == (1.5, False)
    assert settings.adapter_sources == tuple(config["adapter_sources"])
    assert (settings.host, settings.port, settings.log_format) == ("0.0.0.0", 8000, "json")
    assert release.config["metrics_compat"] == "vllm"


@pytest.mark.parametrize("setting", sorted(Settings.model_fields))
def test_every_setting_can_be_set(render: Any, read: Any, setting: str) -> None:
    """Under `config` by its name, or by another value of the chart."""
    elsewhere: dict[str, dict[str, Any]] = {
        "model": {},
        "served_model_name": {},
        "adapters": {"adapterFolder": {"path": "/adapters"}},
        "adapter": {"adapters": [{"name": "a", "path": "/a"}]},
        "watch": {"adapterFolder": {"path": "/adapters", "watch": True}},
        "state_dir": {"state": {"type": "emptyDir"}},
        "cache_dir": {},
        "host": {"config": {"host": "::"}},
        "port": {"containerPort": 1234},
        "api_keys": {"auth": {"secretName": "keys"}},
        "tenant_keys": {"auth": {"secretName": "keys", "tenantsKey": "tenants"}},
        "metrics_compat": {"metricsCompat": "vllm"},
    }
    if setting in elsewhere:
        release = render({"model": MODEL} | elsewhere[setting])
        if setting in secret_settings():
            assert "secretKeyRef" in release.env[f"LORAPLEX_{setting.upper()}"]["valueFrom"]
        else:
            assert setting in release.config
    else:
        default = Settings.model_fields[setting].get_default()
        value = list(default) if isinstance(default, tuple) else default
        release = render({"model": MODEL, "config": {setting: value}})
        assert (setting in release.config) == (value is not None)
    read(release)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ({"hub": "meta-llama/Llama-3.1-8B"}, "meta-llama/Llama-3.1-8B"),
        ({"path": "/baked/model"}, "/baked/model"),
        ({"name": "m", "claim": {"name": "models", "subPath": "llama"}}, "/model"),
        ({"name": "m", "image": {"reference": "registry/models/llama:1"}}, "/model"),
    ],
)
def test_a_model_comes_from_one_place(render: Any, model: dict[str, Any], path: str) -> None:
    release = render({"model": model})
    assert release.config["model"] == path
    assert release.config.get("served_model_name") == model.get("name")
    assert ("model" in release.volumes) == ("model" in release.mounts) == (path == "/model")
    if "claim" in model:
        assert release.volumes["model"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
        assert release.mounts["model"] == {
            "name": "model",
            "mountPath": "/model",
            "readOnly": True,
            "subPath": "llama",
        }
    if "image" in model:
        assert release.volumes["model"]["image"]["reference"] == "registry/models/llama:1"
        assert release.mounts["model"]["readOnly"] is True


def test_the_demo_is_served_without_a_model(render: Any) -> None:
    release = render(DEMO | {"adapters": [{"name": "a", "path": "/a"}]})
    assert release.container["args"][0] == "demo"
    assert not {"model", "adapters", "served_model_name"} & set(release.config)
    assert release.config["adapter"] == ["a=/a"]
    assert render({"model": MODEL}).container["args"][0] == "serve"


def test_a_folder_of_adapters_is_mounted_and_watched(render: Any, read: Any) -> None:
    release = render({"model": MODEL, "adapterFolder": {"claim": {"name": "loras"}, "watch": True}})
    settings = read(release)
    assert (settings.adapters, settings.watch) == (Path("/adapters"), True)
    assert release.mounts["adapters"]["mountPath"] == "/adapters"
    assert release.volumes["adapters"]["persistentVolumeClaim"]["claimName"] == "loras"


def test_secrets_are_only_referred_to(render: Any) -> None:
    values = {
        "auth": {"secretName": "keys", "secretKey": "mine", "tenantsKey": "tenants"},
        "hubToken": {"secretName": "hub"},
        "objectStore": {"secretName": "bucket"},
        "envFrom": [{"configMapRef": {"name": "more"}}],
        "env": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    }
    release = render(DEMO | values)
    assert release.env["LORAPLEX_API_KEYS"]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "mine"}}
    assert release.env["LORAPLEX_TENANT_KEYS"]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "tenants"}}
    assert release.env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert release.container["envFrom"] == [{"secretRef": {"name": "bucket"}}, {"configMapRef": {"name": "more"}}]
    assert release.env["AWS_REGION"]["value"] == "eu-central-1"
    assert not release.all("Secret")
    assert "api_keys" not in release.config


def test_keys_cannot_be_put_where_all_can_read_them(refuse: Any) -> None:
    assert "api_keys" in secret_settings()
    for name in secret_settings():
        assert name in refuse(DEMO | {"config": {name: ["secret"]}})


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "LeaderWorkerSet"])
def test_all_that_is_written_has_a_volume(render: Any, read: Any, kind: str) -> None:
    release = render(DEMO | {"workload": {"kind": kind}})
    settings = read(release)
    written = [settings.state_dir, settings.cache_dir, *map(Path, ("/tmp", "/dev/shm"))]  # type: ignore[list-item]
    written += [Path(release.env[name]["value"]) for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")]
    writable = {Path(mount["mountPath"]) for mount in release.mounts.values() if not mount.get("readOnly")}
    for path in written:
        assert {path, *path.parents} & writable, path
    templates = release.workload["spec"].get("volumeClaimTemplates", [])
    assert set(release.mounts) == {*release.volumes, *(claim["metadata"]["name"] for claim in templates)}
    assert release.volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_a_stateful_set_gives_each_server_its_state(render: Any) -> None:
    values = {"workload": {"kind": "StatefulSet"}, "replicas": 3, "cache": {"type": "perPod", "storageClass": "fast"}}
    release = render(DEMO | values)
    spec = release.workload["spec"]
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in spec["volumeClaimTemplates"]}
    assert {name: claim["resources"]["requests"]["storage"] for name, claim in claims.items()} == {
        "state": "10Gi",
        "cache": "40Gi",
    }
    assert "storageClassName" not in claims["state"]
    assert claims["cache"]["storageClassName"] == "fast"
    headless = next(one for one in release.all("Service") if one["spec"].get("clusterIP") == "None")
    assert spec["serviceName"] == headless["metadata"]["name"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert "persistentVolumeClaimRetentionPolicy" not in render(DEMO | values, "1.20.2").workload["spec"]


def test_one_claim_means_one_server_at_a_time(render: Any) -> None:
    release = render(DEMO | {"state": {"type": "claim", "size": "5Gi"}})
    claim = release.one("PersistentVolumeClaim")
    assert release.volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert release.workload["spec"]["strategy"] == {"type": "Recreate"}
    existing = render(DEMO | {"state": {"type": "claim", "existingClaim": "mine"}})
    assert existing.volumes["state"]["persistentVolumeClaim"]["claimName"] == "mine"
    assert not existing.all("PersistentVolumeClaim")


def test_state_may_be_left_out(render: Any) -> None:
    release = render(DEMO | {"state": {"type": "none"}})
    assert "state_dir" not in release.config
    assert "state" not in release.volumes
    assert "state" not in release.mounts


def test_a_cache_may_live_as_long_as_its_pod(render: Any) -> None:
    release = render(DEMO | {"cache": {"type": "ephemeral", "size": "30Gi"}, "replicas": 3})
    claim = release.volumes["cache"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["resources"]["requests"]["storage"] == "30Gi"
