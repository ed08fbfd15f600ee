"""A short load of all kinds on a server, so that every query of the dashboards has something to tell.

    python tests/deploy/dashboard_load.py http://127.0.0.1:8000 --seconds 15 --keys KEY-OF-ONE KEY-OF-ANOTHER

Answers with and without adapters, streamed and whole; streams that are left early; mistakes of clients; unknown keys.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

PREFIX = "Answer with the word that is asked for, and nothing else. " * 2
"""Long enough for pages of its own, so that prefixes are found again."""

TIMEOUT = 120
MODELS = 24
"""No more are asked, however many there are."""

WORDS = ("kernel", "python", "adapter", "pages")


@dataclass(slots=True)
class Plan:
    """What the clients do: each goes on until the deadline, and until it has had its share of the models."""

    url: str
    names: list[str]
    deadline: float
    turns: int
    statuses: Counter[int]


def run(url: str, seconds: float, keys: Sequence[str] = ("none",), clients: int = 3) -> Counter[int]:
    """Load a server, and count the answers by status. 0 is a stream that was left.

    Args:
        url: of the server.
        seconds: to go on for; longer where the first models of the list were not all asked by then.
        keys: of the clients, who take turns.
        clients: at once.
    """
    with httpx2.Client(base_url=url, headers=_key(keys[0]), timeout=TIMEOUT) as client:
        names = [model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]][:MODELS]
    plan = Plan(url, names, time.monotonic() + seconds, math.ceil(len(names) / clients), Counter())
    threads = [threading.Thread(target=_ask_on, args=(plan, keys[at % len(keys)], at)) for at in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return plan.statuses


def _key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _ask_on(plan: Plan, key: str, number: int) -> None:
    """One client: every model in turn, and each time one of the requests that go wrong."""
    faults = itertools.cycle((_leave, _name_nobody, _send_nonsense, _forget_key))
    with httpx2.Client(base_url=plan.url, headers=_key(key), timeout=TIMEOUT) as client:
        for turn in itertools.count():
            if turn >= plan.turns and time.monotonic() > plan.deadline:
                return
            at = number * plan.turns + turn
            name, word = plan.names[at % len(plan.names)], WORDS[at % len(WORDS)]
            for status in (_ask(client, name, word, stream=at % 2 == 0), next(faults)(client, name)):
                plan.statuses[status] += 1


def _body(name: str, word: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PREFIX + word}]
    return {"model": name, "messages": messages, "max_tokens": 8, **fields}


def _ask(client: httpx2.Client, name: str, word: str, *, stream: bool) -> int:
    return client.post("/v1/chat/completions", json=_body(name, word, stream=stream, ignore_eos=True)).status_code


def _leave(client: httpx2.Client, name: str) -> int:
    with client.stream("POST", "/v1/chat/completions", json=_body(name, "x", stream=True, ignore_eos=True)) as answer:
        lines = answer.iter_lines()
        next(lines, None)
    return 0


def _name_nobody(client: httpx2.Client, name: str) -> int:
    return client.post("/v1/chat/completions", json=_body("nobody", name)).status_code


def _send_nonsense(client: httpx2.Client, name: str) -> int:
    return client.post("/v1/completions", json={"model": name, "max_tokens": "many"}).status_code


def _forget_key(client: httpx2.Client, name: str) -> int:
    return client.post("/v1/completions", json={"model": name, "prompt": "x"}, headers=_key("unknown")).status_code


def main() -> int:
    """The exit status: 1 where nothing was answered."""
    parser = argparse.ArgumentParser(description="Load a server for a short time with requests of all kinds.")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--keys", nargs="+", default=["none"])
    parser.add_argument("--clients", type=int, default=3)
    arguments = parser.parse_args()
    statuses = run(arguments.url, arguments.seconds, arguments.keys, arguments.clients)
    print(", ".join(f"{count} x {status or 'left'}" for status, count in sorted(statuses.items())))
    return 0 if statuses[200] else 1


if __name__ == "__main__":
    sys.exit(main())
