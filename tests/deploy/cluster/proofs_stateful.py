"""What holds of a StatefulSet of two servers that keep what operators load into them."""

from __future__ import annotations

import json
from collections.abc import Callable

import adapters
from kubectl import NAMESPACE, KubectlError, Pod, kubectl, read, wait_until
from load import Report, StreamingLoad
from processes import engine_of, kill, server_of
from release import REPLICAS, Release
from watch import Watch, answers_ready

READY_AGAIN_SECONDS = 120.0
STREAMS = 12


def operator_loads(release: Release) -> str:
    """Adapters that are loaded and uploaded over each server's own API answer there."""
    for pod in release.pods():
        adapters.load_and_upload(pod)
    adapters.check(release.pods())
    return f"{len(adapters.ANSWERS)} adapters on each of {REPLICAS} servers"


def kill_server(release: Release) -> str:
    """A server that is killed with -9 comes back in place, with its adapters; streams of the other do not notice."""
    victim, other = release.pods()
    broken, whole, seconds = _kill(release, victim, other, lambda: kill(server_of(victim.container)))
    (again,) = (pod for pod in release.pods() if pod.name == victim.name)
    assert again.uid == victim.uid
    assert again.restarts == victim.restarts + 1
    adapters.check(release.pods())
    return f"container restarted, ready after {seconds:.0f} s; its streams: {broken}; the other's: {whole}"


def kill_engine(release: Release) -> str:
    """An engine that is killed with -9 is started again by its server, with its adapters; the container goes on."""
    victim, other = release.pods()
    broken, whole, seconds = _kill(release, victim, other, lambda: kill(engine_of(victim.container)))
    (again,) = (pod for pod in release.pods() if pod.name == victim.name)
    assert again.restarts == victim.restarts, "the container was restarted"
    adapters.check(release.pods())
    return f"no restart of the container, ready after {seconds:.0f} s; its streams: {broken}; the other's: {whole}"


def _kill(release: Release, victim: Pod, other: Pod, strike: Callable[[], None]) -> tuple[Report, Report, float]:
    """Strike while both servers stream; what became of the streams of each, and how long it took to be ready again."""
    quick = ("fresh",)
    with StreamingLoad(victim.url, kinds=quick) as hit, StreamingLoad(other.url, kinds=quick) as spared:
        hit.await_more(STREAMS)
        strike()
        wait_until("the server notices", lambda: not answers_ready(victim.url), seconds=10)
        seconds = wait_until("it is ready again", lambda: answers_ready(victim.url), seconds=READY_AGAIN_SECONDS)
        hit.await_more(STREAMS)
        spared.await_more(1)
    release.wait_rolled_out()
    assert not spared.report.failures, spared.report.failures[:5]
    assert all(outcome.problem for outcome in hit.report.failures)
    assert not any("without [DONE]" in outcome.problem for outcome in hit.report.failures), hit.report.failures[:5]
    assert not hit.report.outcomes[-1].problem
    return hit.report, spared.report, seconds


def delete_pod(release: Release) -> str:
    """Another pod in place of one that was deleted has its adapters, from the volume."""
    victim = release.pods()[0]
    with StreamingLoad(release.url) as load, Watch(release) as watch:
        load.await_more(STREAMS)
        kubectl("delete", "pod", victim.name, "--wait=false")
        wait_until("the pod is replaced", lambda: victim.uid not in {pod.uid for pod in release.pods()}, seconds=120)
        seconds = release.wait_rolled_out()
        load.await_more(STREAMS)
    assert watch.least_ready >= 1
    adapters.check(release.pods())
    assert not load.report.failures, load.report.failures[:5]
    return f"{load.report}; ready {seconds:.0f} s after the old one had ended"


def node_drain(release: Release) -> str:
    """Both servers leave a node one after the other, since the disruption budget says so, and no stream is lost."""
    _gather_on(release, "node-a")
    leaving = release.pods()
    with StreamingLoad(release.url) as load, Watch(release) as watch:
        load.await_more(STREAMS)
        kubectl("cordon", "node-a")
        evict(leaving[0])
        assert "disruption budget" in _refusal(leaving[1]), "a second eviction at once was let through"
        kubectl("drain", "node-a", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout", "300s", seconds=320)
        release.wait_rolled_out()
        load.await_more(STREAMS)
    kubectl("uncordon", "node-a")
    pods = release.pods()
    assert {pod.node for pod in pods} == {"node-b"}, pods
    assert watch.least_ready >= 1
    adapters.check(pods)
    assert not load.report.failures, load.report.failures[:5]
    return f"second eviction refused until the first was made good; {load.report}"


def _gather_on(release: Release, node: str) -> None:
    """Bring both servers to one node."""
    others = [item["metadata"]["name"] for item in read("nodes")["items"] if item["metadata"]["name"] != node]
    for other in others:
        kubectl("cordon", other)
    for pod in release.pods():
        if pod.node != node:
            kubectl("delete", "pod", pod.name)
            release.wait_rolled_out()
    for other in others:
        kubectl("uncordon", other)
    assert {pod.node for pod in release.pods()} == {node}


def evict(pod: Pod) -> None:
    """Ask the eviction API.

    Raises:
        KubectlError: it refuses.
    """
    body = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": pod.name, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod.name}/eviction"
    kubectl("create", "--raw", path, "--filename", "-", given=json.dumps(body))


def _refusal(pod: Pod) -> str:
    try:
        evict(pod)
    except KubectlError as error:
        return str(error)
    return ""


def adapters_are_there(release: Release) -> str:
    """After all of that, every server has what was loaded into it at the beginning."""
    adapters.check(release.pods())
    return f"{len(adapters.ANSWERS)} adapters on each of {REPLICAS} servers answer as at first"
