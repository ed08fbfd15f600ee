"""What the releases of the test are made from: the chart's values, and the volumes that claims find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kubectl import NAMESPACE, apply
from release import REPLICAS

STORAGE_CLASS = "shared"
USER = 10001
NODES = ("node-a", "node-b")


def of_release(image: str, kind: str) -> dict[str, Any]:
    """Values of a release of the demo: two servers on few cores, which look at their probes often."""
    repository, _, tag = image.rpartition(":")
    on_host = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "demo": True,
        "workload": {"kind": kind},
        "replicas": REPLICAS,
        "config": {"threads": 1, "pool_bytes": "128MiB", "host_adapter_bytes": "128MiB", "log_format": "json"},
        "state": {"size": "1Gi", "storageClass": STORAGE_CLASS},
        "cache": {"size": "1Gi"},
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}},
        "probes": {
            "startup": {"budgetSeconds": 180, "periodSeconds": 2, "timeoutSeconds": 2},
            "readiness": {"periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 2},
        },
        "topologySpreadConstraints": [
            on_host | {"labelSelector": {"matchLabels": {"app.kubernetes.io/instance": f"demo-{kind.lower()}"}}}
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
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": STORAGE_CLASS,
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [host]}]}},
        },
    }
