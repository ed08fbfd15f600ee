"""What holds of a Deployment of two servers."""

from __future__ import annotations

from kubectl import KubectlError, kubectl, ready_addresses, wait_until
from load import StreamingLoad
from release import REPLICAS, Release
from watch import Watch

LOAD_BEFORE = 12
LOAD_AFTER = 12


def install_and_probes(release: Release) -> str:
    """Two servers get ready, on two nodes, and the Service knew none of them before."""
    with Watch(release) as watch:
        release.install()
        seconds = release.wait_rolled_out()
    assert not watch.unready_addresses, watch.unready_addresses
    pods = release.pods()
    assert len({pod.node for pod in pods}) == REPLICAS, pods
    assert not any(pod.restarts for pod in pods), pods
    return f"{REPLICAS} servers ready on {REPLICAS} nodes after {seconds:.0f} s; {watch.looks} looks, none early"


def helm_test(release: Release) -> str:
    """The chart's own test passes: a pod that asks the Service by its name."""
    release.write_name()
    release.test()
    return "passed"


def rolling_update(release: Release) -> str:
    """``helm upgrade`` replaces both servers while streams run, and each stream comes to its end."""
    before = {pod.uid for pod in release.pods()}
    with StreamingLoad(release.url) as load, Watch(release) as watch:
        load.await_more(LOAD_BEFORE)
        release.upgrade({"podAnnotations": {"loraplex.test/turn": "2"}})
        seconds = release.wait_rolled_out()
        load.await_more(LOAD_AFTER)
    assert not before & {pod.uid for pod in release.pods()}
    assert watch.least_ready >= 1
    assert not load.report.failures, load.report.failures[:5]
    return f"{load.report}; {seconds:.0f} s"


def broken_update_and_rollback(release: Release) -> str:
    """An upgrade that cannot start gets no stream and leaves one server; a rollback brings the other one back."""
    good = release.revisions()[-1]
    with StreamingLoad(release.url) as load, Watch(release) as watch:
        load.await_more(LOAD_BEFORE)
        release.upgrade({"adapters": [{"name": "missing", "path": "/nowhere"}]})
        wait_until("a new server fails", lambda: any(pod.restarts for pod in release.pods()), seconds=180)
        failing = {pod.address for pod in release.pods() if not pod.ready}
        assert not failing & ready_addresses(release.name)
        release.rollback(good)
        seconds = release.wait_rolled_out()
        load.await_more(LOAD_AFTER)
    assert watch.least_ready >= 1
    assert not watch.unready_addresses, watch.unready_addresses
    assert not load.report.failures, load.report.failures[:5]
    return f"{load.report}; back after {seconds:.0f} s"


def uninstall(release: Release) -> str:
    """Nothing of the release is left, but the claims of a StatefulSet, which hold what users uploaded."""
    release.uninstall()
    wait_until("the servers are gone", lambda: not release.pods(), seconds=90)
    kinds = kubectl("api-resources", "--verbs", "list", "--namespaced", "--output", "name").split()
    kept = {"persistentvolumeclaims"} if release.kind == "statefulset" else set()
    looked_at = [kind for kind in kinds if kind not in kept and not kind.startswith("events")]
    wait_until("nothing is left", lambda: not _left(release, looked_at), seconds=60)
    return f"of {len(looked_at)} kinds of objects nothing is left"


def _left(release: Release, kinds: list[str]) -> str:
    selector = f"app.kubernetes.io/instance={release.name}"
    try:
        by_label = kubectl("get", ",".join(kinds), "--selector", selector, "--output", "name")
        by_helm = kubectl("get", "secrets", "--selector", f"name={release.name},owner=helm", "--output", "name")
    except KubectlError as error:
        return str(error)
    return by_label + by_helm
