"""deploy/compose.yaml and what it mounts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def mounts(service: str) -> list[tuple[str, str]]:
    return [(source, target) for source, target, *_ in (entry.split(":") for entry in SERVICES[service]["volumes"])]


def source_of(service: str, target: str) -> Path:
    """The folder or file of this repository that a service sees at a path."""
    return next(DEPLOY / source for source, there in mounts(service) if there == target)


def test_the_file_follows_the_compose_specification() -> None:
    tool = Path(sys.executable).parent / "check-jsonschema"
    checked = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_every_mounted_path_and_volume_exists(service: str) -> None:
    for source, _ in mounts(service):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned_and_hold_no_privileges(service: str) -> None:
    image, _, version = SERVICES[service]["image"].rpartition(":")
    assert image
    assert version[:1] == "v" or version[:1].isdigit()
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_open_on_this_machine_alone(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])


def test_the_server_may_write_only_where_the_image_says() -> None:
    server = SERVICES["loraplex"]
    assert server["read_only"] is True
    written = {target for _, target in mounts("loraplex")} | {entry.split(":")[0] for entry in server["tmpfs"]}
    assert written == {"/var/lib/loraplex", "/var/cache/loraplex", "/tmp"}


def test_the_drain_fits_in_the_time_that_a_stop_gives() -> None:
    assert int(SERVICES["loraplex"]["stop_grace_period"].removesuffix("s")) > 30


def test_prometheus_accepts_its_configuration(require_tool: Callable[[str], str], tmp_path: Path) -> None:
    config = yaml.safe_load(source_of("prometheus", "/etc/prometheus/prometheus.yaml").read_text())
    rules = source_of("prometheus", "/etc/prometheus/rules")
    assert config["rule_files"] == ["/etc/prometheus/rules/*.yaml"]
    config["rule_files"] = [str(path) for path in rules.glob("*.yaml")]
    assert config["rule_files"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    checked = subprocess.run(
        [require_tool("promtool"), "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_scrapes_the_server_of_the_file() -> None:
    config = yaml.safe_load(source_of("prometheus", "/etc/prometheus/prometheus.yaml").read_text())
    targets = [
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    assert targets == ["loraplex:8000"]


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = source_of("grafana", "/etc/grafana/provisioning")
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    assert sources[0]["isDefault"] is True
    providers = yaml.safe_load((provisioning / "dashboards" / "loraplex.yaml").read_text())["providers"]
    dashboards = source_of("grafana", providers[0]["options"]["path"])
    assert list(dashboards.glob("*.json"))
