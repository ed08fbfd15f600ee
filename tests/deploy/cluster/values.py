"""What the releases of the test are made from: the chart's values, and the volumes that claims find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from kubectl import NAMESPACE, apply
from merge import merged
from release import REPLICAS

STORAGE_CLASS = "shared"
VOLUME_SIZE = "1Gi"
USER = 10001
NODES = ("node-a", "node-b")


def release_name(kind: str) -> str:
    """The chart gives its objects this name too, since its own name is in it."""
    return f"loraplex-{kind.lower()}"


def of_release(chart: Path, image: str, kind: str) -> dict[str, Any]:
    """The chart's own example of the demo on a CPU, with what a test on few cores changes: two servers, in a hurry."""
    example: dict[str, Any] = yaml.safe_load((chart / "examples" / "cpu-demo.yaml").read_text())
    return merged(example, _changes(image, kind))


def _changes(image: str, kind: str) -> dict[str, Any]:
    repository, _, tag = image.rpartition(":")
    on_host = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "workload": {"kind": kind},
        "replicas": REPLICAS,
        "config": {"threads": 1, "pool_bytes": "128MiB", "linger_seconds": 5},
        "state": {"size": VOLUME_SIZE, "storageClass": STORAGE_CLASS},
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}},
        "probes": {"startup": {"periodSeconds": 2}, "readiness": {"periodSeconds": 2}},
        "topologySpreadConstraints": [
            on_host | {"labelSelector": {"matchLabels": {"app.kubernetes.io/instance": release_name(kind)}}}
        ],
    }


def prepare_namespace(volumes: Path) -> None:
    """A namespace, and a volume for each server that any node can reach."""
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    for index in range(REPLICAS):
        folder = volumes / str(index)
        folder.mkdir(parents=True)
        os.chown(folder, USER, USER)
        apply(_volume(f"volume-{index}", folder))


def _volume(name: str, folder: Path) -> dict[str, Any]:
    host = {"key": "kubernetes.io/hostname", "operator": "In", "values": list(NODES)}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": VOLUME_SIZE},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": STORAGE_CLASS,
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [host]}]}},
        },
    }
