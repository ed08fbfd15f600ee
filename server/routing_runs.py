"""What routers chose, as answers tell it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraplex.server.messages import RouterChoice


def routing_runs(choices: Iterable[RouterChoice]) -> list[dict[str, Any]]:
    """The ``routing`` of a choice: an entry for each router and each run of consecutive tokens, in order of arrival."""
    runs: list[dict[str, Any]] = []
    latest: dict[tuple[str, int | None, str], dict[str, Any]] = {}
    for choice in choices:
        router = (choice.adapter, choice.layer, choice.site)
        run = latest.get(router)
        if run is None or run["start"] + len(run["experts"]) != choice.start:
            run = latest[router] = _empty_run(choice)
            runs.append(run)
        run["experts"] += choice.experts
        run["weights"] += choice.weights
    return runs


def _empty_run(choice: RouterChoice) -> dict[str, Any]:
    where = {"adapter": choice.adapter, "layer": choice.layer, "site": choice.site, "start": choice.start}
    return where | {"experts": [], "weights": []}
