"""The cluster as its API shows it: objects, pods and what became of them."""

from __future__ import annotations

import functools
import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

NAMESPACE = "loraplex"
API_SERVER = "https://10.97.0.1:6443"


class KubectlError(Exception):
    """A command was refused; the message is what kubectl said."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a release at one moment. ``container`` is the id of its server's container, empty before it runs."""

    name: str
    uid: str
    node: str
    address: str
    ready: bool
    ending: bool
    restarts: int
    container: str

    @property
    def url(self) -> str:
        """Of its server, past the Service."""
        return f"http://{self.address}:8000"


def kubectl(*arguments: str, given: str | None = None, seconds: float = 120) -> str:
    """What a command prints.

    Raises:
        KubectlError: it failed.
    """
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise KubectlError(f"{' '.join(arguments[:4])}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def _api() -> httpx2.Client:
    """A connection to the API server: many questions a second cost it little, which as many commands would not."""
    keys = Path(os.environ["CLUSTER_FOLDER"]) / "keys"
    context = ssl.create_default_context(cafile=keys / "ca.crt")
    context.load_cert_chain(keys / "admin.crt", keys / "admin.key")
    return httpx2.Client(base_url=API_SERVER, verify=context, timeout=30)


def read(kind: str, name: str = "", *, selector: str = "") -> dict[str, Any]:
    """An object, or the list of those that a selector fits.

    Raises:
        KubectlError: there is no such object, or no answer.
    """
    group = "/apis/apps/v1" if kind in {"deployments", "statefulsets"} else "/api/v1"
    within = "" if kind == "nodes" else f"/namespaces/{NAMESPACE}"
    try:
        answer = _api().get(f"{group}{within}/{kind}/{name}".rstrip("/"), params={"labelSelector": selector})
    except httpx2.HTTPError as error:
        raise KubectlError(f"{kind} {name}: {error}") from error
    if answer.status_code != 200:
        raise KubectlError(f"{kind} {name}: {answer.text[:200]}")
    shown: dict[str, Any] = answer.json()
    return shown


def apply(*objects: dict[str, Any]) -> None:
    """Create objects, or make them what is given."""
    kubectl("apply", "--filename", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


def pods(release: str) -> list[Pod]:
    """The servers of a release, by name."""
    selector = f"app.kubernetes.io/instance={release},app.kubernetes.io/component=server"
    return sorted((_pod(item) for item in read("pods", selector=selector)["items"]), key=lambda pod: pod.name)


def _pod(item: dict[str, Any]) -> Pod:
    status = item["status"]
    containers = status.get("containerStatuses") or [{}]
    conditions = {one["type"]: one["status"] == "True" for one in status.get("conditions", ())}
    return Pod(
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        node=item["spec"].get("nodeName", ""),
        address=status.get("podIP", ""),
        ready=conditions.get("Ready", False),
        ending="deletionTimestamp" in item["metadata"],
        restarts=containers[0].get("restartCount", 0),
        container=containers[0].get("containerID", "").rpartition("/")[2],
    )


def ready_addresses(service: str) -> set[str]:
    """Where a Service sends new connections."""
    subsets = read("endpoints", service).get("subsets") or ()
    return {address["ip"] for subset in subsets for address in subset.get("addresses", ())}


def wait_until(what: str, holds: Callable[[], bool], *, seconds: float) -> float:
    """Ask again and again until something holds; the seconds that it took.

    Raises:
        AssertionError: it did not hold in time.
    """
    began = time.monotonic()
    while not holds():
        assert time.monotonic() < began + seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - began
