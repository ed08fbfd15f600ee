"""The record of a run: what was proved, on what, with which numbers."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import helm_python
from kubectl import kubectl, read


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a proof; ``found`` has its numbers, or why it failed."""

    name: str
    passed: bool
    found: str
    seconds: float


def table(results: Sequence[Result], image: str) -> str:
    """The record in Markdown."""
    rows = "\n".join(map(_row, results))
    passed = sum(one.passed for one in results)
    return f"""
# On a cluster

`make cluster-test`; {datetime.now(UTC):%Y-%m-%d}; commit {_commit()}; {versions()};
image `{image}`. {passed} of {len(results)} proofs passed, in {sum(one.seconds for one in results) / 60:.0f} minutes.

| proof | | found | took |
| --- | --- | --- | --- |
{rows}
"""


def _row(one: Result) -> str:
    passed = "passed" if one.passed else "**failed**"
    return f"| {one.name} | {passed} | {one.found.replace('|', '/')} | {one.seconds:.0f} s |"


def versions() -> str:
    """Of what the cluster is made from."""
    server = json.loads(kubectl("version", "--output", "json"))["serverVersion"]["gitVersion"]
    info = read("nodes")["items"][0]["status"]["nodeInfo"]
    return (
        f"Kubernetes {server} with {len(read('nodes')['items'])} nodes, {info['containerRuntimeVersion']}, "
        f"Helm SDK {helm_python.helm_sdk_version()}, Linux {platform.release()}"
    )


def _commit() -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
