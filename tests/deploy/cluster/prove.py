"""Proves a chart and an image on the cluster that deploy/cluster/run.sh makes. Prints a record; fails if a proof does.

Proofs run in order, on two releases of the chart one after the other: a Deployment, and a StatefulSet with volumes.
Where one fails, logs and events are printed, and the next one begins; without a release there is none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import proofs_stateful as stateful
import proofs_stateless as stateless
import record
import values
import yaml
from helm_python import HelmError
from kubectl import KubectlError, kubectl
from merge import merged
from record import Result
from release import Release

ROOT = Path(__file__).resolve().parents[3]
Proof = Callable[[Release], str]

ON_DEPLOYMENT: tuple[Proof, ...] = (
    stateless.install_and_probes,
    stateless.helm_test,
    stateless.rolling_update,
    stateless.broken_update_and_rollback,
    stateless.uninstall,
)
ON_STATEFUL_SET: tuple[Proof, ...] = (
    stateless.install_and_probes,
    stateful.operator_loads,
    stateful.kill_server,
    stateful.kill_engine,
    stateful.delete_pod,
    stateful.node_drain,
    stateless.rolling_update,
    stateful.adapters_are_there,
    stateless.uninstall,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="reference of the image, which the nodes have")
    parser.add_argument("--chart", type=Path, default=ROOT / "deploy" / "helm" / "loraplex")
    parser.add_argument("--only", default="", help="run only proofs whose name has this in it; installing always runs")
    parser.add_argument("--values", type=Path, help="a file of values on top of those of the test")
    args = parser.parse_args(arguments)
    more = yaml.safe_load(args.values.read_text()) if args.values else {}
    values.prepare_namespace(Path(os.environ["CLUSTER_FOLDER"]) / "volumes")
    results: list[Result] = []
    for kind, proofs in (("Deployment", ON_DEPLOYMENT), ("StatefulSet", ON_STATEFUL_SET)):
        release = Release(
            args.chart, values.release_name(kind), merged(values.of_release(args.chart, args.image, kind), more)
        )
        wanted = [proof for proof in proofs if args.only in proof.__name__ or proof is proofs[0]]
        results += _prove(release, kind, wanted)
    sys.stdout.write(record.table(results, args.image))
    return 0 if all(result.passed for result in results) else 1


def _prove(release: Release, kind: str, proofs: Sequence[Proof]) -> list[Result]:
    results: list[Result] = []
    for proof in proofs:
        name = f"{kind}: {proof.__name__.replace('_', ' ')}"
        began = time.monotonic()
        try:
            found, passed = proof(release), True
        except (AssertionError, HelmError, KubectlError, OSError, ValueError, StopIteration) as error:
            traceback.print_exc()
            _show_state(release)
            found, passed = f"{type(error).__name__}: {error}".partition("\n")[0][:300], False
        results.append(Result(name, passed, found, time.monotonic() - began))
        print(f"{'passed' if passed else 'FAILED'} {name} ({results[-1].seconds:.0f} s): {found}", flush=True)
        if not passed and proof is proofs[0]:
            _remove(release)
            break
    return results


def _remove(release: Release) -> None:
    try:
        release.uninstall()
    except HelmError as error:
        print(error, file=sys.stderr)


def _show_state(release: Release) -> None:
    for arguments in (
        ("get", "pods", "--output", "wide"),
        ("get", "events", "--sort-by", ".lastTimestamp"),
        ("logs", "--selector", f"app.kubernetes.io/instance={release.name}", "--tail", "15", "--prefix"),
    ):
        try:
            print(kubectl(*arguments)[-5000:], file=sys.stderr)
        except KubectlError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
