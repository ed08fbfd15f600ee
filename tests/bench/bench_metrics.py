"""What a scrape of ``/metrics`` costs the HTTP process: CPU time per page, with as many adapters named as by default.

Every page is written anew, after a tenth of a second's worth of tokens, requests and an engine's snapshot. Beside it:
the same families written by prometheus_client. The last line of the output is the record, as JSON.

    python tests/bench/bench_metrics.py [--pages 200] [--rounds 10]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_view import AdapterView
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.messages import AdapterInfo, AdapterRef, AdapterState, EngineInfo, EngineStats, TierUse
from loraplex.server.metrics import ServerMetrics
from loraplex.server.metrics_page import MetricsPage

REGISTERED = 10_000
IN_POOL, ON_HOST = 80, 120


class Engine:
    """What metrics see of an engine."""

    def __init__(self) -> None:
        self.adapters = AdapterView()
        self.on_stats: list[Callable[[EngineStats], None]] = []
        self.stats = EngineStats()
        self.state = "ready"
        self.wanted: list[tuple[str, int]] = []
        self.info = EngineInfo(
            model_path="/model",
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            device="cpu",
            vocab_size=1,
            max_model_len=1,
            num_pages=1000,
            page_tokens=16,
            page_bytes=4096,
            num_parameters=1,
        )


class Load:
    """A server's metrics, and what happens to them in a tenth of a second."""

    def __init__(self, compat: Any) -> None:
        self.engine = Engine()
        registry = AdapterRegistry("base")
        registry.register_all(AdapterRef(name=f"adapter-{at}", path=f"/a/{at}") for at in range(REGISTERED))
        engine: Any = self.engine
        self.metrics = ServerMetrics(engine, registry, Lifecycle(), 100, compat=compat)
        info = AdapterInfo(identity="", kind="lora", rank=8, targets=[], bytes=1, pages=1)
        self.engine.adapters.update(
            [
                AdapterState(path=f"/a/{at}", revision=0, tier="pool" if at < IN_POOL else "host", info=info)
                for at in range(IN_POOL + ON_HOST)
            ]
        )
        self.page = MetricsPage(self.metrics.registry, self.metrics.collect, share=math.inf)
        self._steps = 0

    def go_on(self) -> None:
        """Ten steps of both kinds, a request, a snapshot."""
        for _ in range(10):
            self.metrics.tokens_came("adapter", 1, 0.01)
            self.metrics.tokens_came("base", 1, 0.02)
        self.metrics.first_token("adapter", 0.1, 0.01)
        self.metrics.request_ended("adapter", "finished", 1.0)
        self.metrics.http_request("/v1/chat/completions", 200, None)
        self._steps += 10
        tiers = [TierUse("pool", "lora", IN_POOL, 1, IN_POOL), TierUse("host", "lora", ON_HOST, 1)]
        self.engine.stats = EngineStats(
            running=8, pages_total=1000, steps=self._steps, step_seconds=[0.01] * 10, tiers=tiers
        )
        for callback in self.engine.on_stats:
            callback(self.engine.stats)


def milliseconds(load: Load, write: Callable[[], object], pages: int, rounds: int) -> float:
    """CPU time per page, of the best round."""
    best = math.inf
    for _ in range(rounds):
        spent = 0.0
        for _ in range(pages):
            load.go_on()
            started = time.process_time()
            write()
            spent += time.process_time() - started
        best = min(best, spent / pages * 1000)
    return round(best, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"machine": describe(), "named_adapters": 100, "cpu_milliseconds_per_page": {}}
    for compat in ("none", "vllm"):
        load = Load(compat)
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda page=load.page: page.answer("", ""),
            "gzip": lambda page=load.page: page.answer("", "gzip"),
            "prometheus_client": lambda registry=load.metrics.registry: generate_latest(registry),
        }
        times = {name: milliseconds(load, write, arguments.pages, arguments.rounds) for name, write in ways.items()}
        sizes = {name: len(load.page.answer("", name.replace("plain", ""))[0]) for name in ("plain", "gzip")}
        record["cpu_milliseconds_per_page"][compat] = times | {"bytes": sizes}
        print(f"--metrics-compat {compat}: {times} {sizes}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
