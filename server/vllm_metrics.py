"""The metrics that cluster routers read of vLLM, under its names, told of this server (docs/routing.md).

Only what routers read is here; all else is under our own names. What the words mean where there are no slots:

- *running adapters* are those in the pool, in use or idle: a request for one of them waits for no load.
- *most adapters* are those in the pool and as many more, of their mean size, as fit into pages that hold no adapter
  and no sequence. A router takes a server with more of them than there are for one with room.
- *usage* is the share of pages that could not be had by evicting anything: those of sequences, and those of adapters in
  use or pinned. Idle adapters and cached prefixes are room for whoever comes, so a pool full of them is not full. Pages
  of adapters in use count, because they are lost to K/V just as K/V itself is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loraplex.server.adapter_series import AdapterSeries, HeldAdapter
from loraplex.server.engine_client import EngineClient
from loraplex.server.exposition import Distribution, Family, Labels, LiveCounts, LiveTimes, Rows
from loraplex.server.messages import EngineStats

LABELS = ("model_name", "engine")
LEVELS = {"pool": "gpu", "host": "cpu"}
REASONS = ("stop", "length", "abort", "error")
ENDED = {"aborted": "abort", "failed": "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Our counters by kind: of tokens, of choices by reason, of requests by outcome."""

    prompt: LiveCounts
    generated: LiveCounts
    finished: LiveCounts
    requests: LiveCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Our histograms by kind."""

    first: LiveTimes
    gaps: LiveTimes
    queued: LiveTimes
    whole: LiveTimes


class VllmMetrics:
    """vLLM's families over ours.

    Args:
        model_name: of the base model.
        engine: whose snapshots are told.
        adapters: the ones that are named.
    """

    def __init__(
        self, model_name: str, engine: EngineClient, adapters: AdapterSeries, counts: Counts, times: Times
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._labels = (model_name, "0")
        self._shown: tuple[EngineStats | None, tuple[Family, ...]] = (None, ())
        self._loaded: tuple[tuple[HeldAdapter, ...] | None, Rows] = (None, self._rows("vllm:lora_adapter_loaded", ""))
        self._edge: tuple[Family, ...] = (
            _Total("vllm:prompt_tokens", "Tokens of prompts.", self._labels, counts.prompt),
            _Total("vllm:generation_tokens", "Tokens generated.", self._labels, counts.generated),
            _Successes(self._labels, counts.finished, counts.requests),
            *(
                _Together(f"vllm:{name}_seconds", text, self._labels, ours)
                for name, text, ours in (
                    ("time_to_first_token", "From the request to its first token.", times.first),
                    ("inter_token_latency", "Between two outputs of a choice.", times.gaps),
                    ("e2e_request_latency", "From the request to its end.", times.whole),
                    ("request_queue_time", "From the request to its first step.", times.queued),
                )
            ),
        )

    def families(self) -> Iterator[Family]:
        """All of them. One that is the same object as before has not changed."""
        stats = self._engine.stats
        if self._shown[0] is not stats:
            self._shown = stats, tuple(self._families_of(stats))
        yield from self._shown[1]
        held = self._adapters.held()
        if self._loaded[0] is not held:
            self._loaded = held, self._loaded_family(held)
        yield self._loaded[1]
        yield self._requests_info(held, stats)
        yield from self._edge

    def _families_of(self, stats: EngineStats) -> Iterator[Family]:
        on_host = sum(use.adapters for use in stats.tiers if use.tier == "host")
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", stats.running),
            ("num_requests_waiting", "Sequences waiting for their turn.", stats.waiting),
            ("kv_cache_usage_perc", "Share of pages that could not be had by eviction; 1 is all.", usage(stats)),
            ("num_gpu_loaded_lora_adapters", "Adapters in the pool.", stats.adapters_resident),
            ("max_gpu_lora_adapters", "Adapters in the pool, and more that would fit.", self._most(stats)),
            ("num_cpu_loaded_lora_adapters", "Adapters on the host.", on_host),
        ):
            family = self._rows(f"vllm:{name}", text)
            family.add_metric(self._labels, value)
            yield family
        if self._engine.state == "ready":
            info = self._engine.info
            config = self._rows("vllm:cache_config_info", "The pool; always 1.", "block_size", "num_gpu_blocks")
            config.add_metric((*self._labels, str(info.page_tokens), str(info.num_pages)), 1)
            yield config

    def _most(self, stats: EngineStats) -> int:
        """How many adapters the pool would hold if pages without use were given to more of them."""
        return stats.adapters_resident + (stats.pages_free + stats.pages_cached) // self._mean_pages(stats)

    def _mean_pages(self, stats: EngineStats) -> int:
        """Pages of an adapter, from those in the pool or else on the host; 1 where there are none. Rounded up."""
        count = sum(use.adapters for use in stats.tiers if use.tier == "pool")
        pages = sum(use.pages for use in stats.tiers if use.tier == "pool")
        if not count and self._engine.state == "ready":
            count = sum(use.adapters for use in stats.tiers if use.tier == "host")
            pages = sum(use.bytes for use in stats.tiers if use.tier == "host") // self._engine.info.page_bytes
        return max(1, -(-pages // count)) if count else 1

    def _loaded_family(self, held: Iterable[HeldAdapter]) -> Rows:
        text = "Adapters by where they are; always 1."
        family = self._rows("vllm:lora_adapter_loaded", text, "adapter_name", "level", "pinned", "rank")
        for one in held:
            pinned = str(one.pinned).lower()
            family.add_metric((*self._labels, one.name, LEVELS[one.tier], pinned, str(one.rank)), 1)
        return family

    def _requests_info(self, held: Iterable[HeldAdapter], stats: EngineStats) -> Family:
        """One series, so that a router need not look for the latest. Its room is counted from the adapters it names."""
        running = [one.name for one in held if one.tier == "pool"]
        most = self._most(stats) - stats.adapters_resident + len(running)
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = Rows("vllm:lora_requests_info", "Adapters in the pool, and wanted there; Unix time.", "gauge", names)
        family.add_metric((str(most), ",".join(running), ",".join(self._adapters.wanted())), round(time.time(), 3))
        return family

    def _rows(self, name: str, text: str, *more: str) -> Rows:
        return Rows(name, text, "gauge", (*LABELS, *more))


def usage(stats: EngineStats) -> float:
    """How full the pool is, 0 to 1."""
    return stats.pages_held / stats.pages_total if stats.pages_total else 0.0


class _Total(LiveCounts):
    """One of our counters, all kinds together."""

    def __init__(self, name: str, text: str, labels: Labels, ours: LiveCounts) -> None:
        super().__init__(name, text, "counter", LABELS)
        self._values = labels
        self._ours = ours

    def values(self) -> Iterable[tuple[Labels, float]]:
        yield self._values, sum(value for _, value in self._ours.values())


class _Successes(LiveCounts):
    """Choices that were finished, by reason, and requests that were not."""

    def __init__(self, labels: Labels, finished: LiveCounts, requests: LiveCounts) -> None:
        text = "Choices that were finished, and requests that ended otherwise."
        super().__init__("vllm:request_success", text, "counter", (*LABELS, "finished_reason"))
        self._values = labels
        self._finished = finished
        self._requests = requests

    def values(self) -> Iterable[tuple[Labels, float]]:
        found: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        for (*_, reason), count in self._finished.values():
            found[reason] += int(count)
        for (*_, outcome), count in self._requests.values():
            if outcome in ENDED:
                found[ENDED[outcome]] += int(count)
        return (((*self._values, reason), count) for reason, count in found.items())


@dataclass(frozen=True, slots=True)
class _Sum:
    """Histograms with the same bounds as one."""

    parts: list[Distribution]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def sum(self) -> float:
        return sum(part.sum for part in self.parts)

    def buckets(self) -> list[tuple[str, float]]:
        rows = zip(*(part.buckets() for part in self.parts), strict=True)
        return [(row[0][0], sum(count for _, count in row)) for row in rows]


class _Together(LiveTimes):
    """One of our histograms, all kinds together."""

    def __init__(self, name: str, text: str, labels: Labels, ours: LiveTimes) -> None:
        super().__init__(name, text, LABELS)
        self._values = labels
        self._ours = ours

    def values(self) -> Iterable[tuple[Labels, Distribution]]:
        yield self._values, _Sum([one for _, one in self._ours.values()])
