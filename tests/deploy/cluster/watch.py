"""What is true at every moment of a change: looked at several times a second while a block runs."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import httpx2
from kubectl import KubectlError, ready_addresses
from release import Release

SECONDS_BETWEEN = 0.3


class Watch:
    """Looks at a release while the block runs.

    ``least_ready`` is the smallest number of servers that the Service knew; ``unready_addresses`` are those that it
    knew twice in a row although their ``/readyz`` did not answer 200.
    """

    def __init__(self, release: Release) -> None:
        self.least_ready = 1_000_000
        self.looks = 0
        self.unready_addresses: list[str] = []
        self._release = release
        self._suspects: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN):
            try:
                known = ready_addresses(self._release.name)
            except KubectlError:
                known = set()
            unready = {address for address in known if not answers_ready(f"http://{address}:8000")}
            self.unready_addresses += sorted(unready & self._suspects)
            self._suspects = unready
            self.least_ready = min(self.least_ready, len(known))
            self.looks += 1


def answers_ready(url: str) -> bool:
    """Whether a server says that it is ready."""
    try:
        return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
