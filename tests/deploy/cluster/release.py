"""A release of the chart, handled by Helm's own SDK, and the addresses of what it made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import helm_python
from kubectl import NAMESPACE, Pod, kubectl, pods, read, ready_addresses, wait_until
from merge import merged

REPLICAS = 2
START_SECONDS = 420.0


class Release:
    """One release; its workload is a Deployment or a StatefulSet, and its name is that of its Service."""

    def __init__(self, chart: Path, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values
        self._chart = chart
        self._helm = helm_python.Config(kubeconfig_path=os.environ["KUBECONFIG"], namespace=NAMESPACE)

    @property
    def kind(self) -> str:
        """Of its workload, as kubectl spells it."""
        return str(self.values["workload"]["kind"]).lower()

    @property
    def url(self) -> str:
        """Of its Service."""
        return f"http://{read('services', self.name)['spec']['clusterIP']}:8000"

    def pods(self) -> list[Pod]:
        """Its servers."""
        return pods(self.name)

    def install(self) -> None:
        """``helm install``; returns at once."""
        self._helm.install(self._chart, self.name, self.values, timeout=60)

    def upgrade(self, changes: dict[str, Any]) -> None:
        """``helm upgrade`` with other values; returns at once."""
        self._helm.upgrade(self._chart, self.name, merged(self.values, changes), timeout=60)

    def rollback(self, revision: int) -> None:
        """``helm rollback``; returns at once."""
        self._helm.rollback(self.name, version=revision, timeout=60)

    def write_name(self) -> None:
        """Tell the cluster's name server of the Service: it knows nothing but what is written there."""
        address = read("services", self.name)["spec"]["clusterIP"]
        names = Path(os.environ["CLUSTER_FOLDER"]) / "names" / self.name
        names.write_text(f"{address} {self.name}.{NAMESPACE}.svc.cluster.local\n")

    def test(self) -> None:
        """``helm test``; an error of Helm's if it fails."""
        self._helm.test(self.name, timeout=120, logs=True)

    def uninstall(self) -> None:
        """``helm uninstall``; returns at once."""
        self._helm.uninstall(self.name, timeout=60)

    def revisions(self) -> list[int]:
        """Of its history."""
        return [int(entry["revision"]) for entry in self._helm.history(self.name)]

    def wait_rolled_out(self) -> float:
        """Until the workload has its newest pods, all ready, and no others; the seconds that took."""
        return wait_until(f"{self.name} is rolled out", self._is_rolled_out, seconds=START_SECONDS)

    def _is_rolled_out(self) -> bool:
        shown = read(f"{self.kind}s", self.name)
        status = shown["status"]
        return (
            status.get("observedGeneration") == shown["metadata"]["generation"]
            and status.get("updatedReplicas") == status.get("readyReplicas") == REPLICAS
            and len(self.ready_pods()) == len(self.pods()) == REPLICAS
            and ready_addresses(self.name) == {pod.address for pod in self.pods()}
        )

    def ready_pods(self) -> list[Pod]:
        """Those that take requests."""
        return [pod for pod in self.pods() if pod.ready and not pod.ending]

    def logs(self) -> str:
        """The last lines of each server."""
        return kubectl("logs", "--selector", f"app.kubernetes.io/instance={self.name}", "--tail", "15", "--prefix")
