"""Where adapters are and how they get there, for Prometheus. All labels are tiers, kinds, results and reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraplex.server.exposition import Rows
from loraplex.server.messages import AdapterTier, EngineStats, TierCount, TierUse

TIERS: tuple[AdapterTier, ...] = ("pool", "host")
EVICTIONS = (("pool", "room"), ("pool", "price"), ("pool", "dropped"), ("host", "room"))
LOOKUPS = tuple((tier, result) for tier in TIERS for result in ("hit", "miss"))


def tier_families(stats: EngineStats) -> Iterator[Rows]:
    """Use, lookups and evictions by tier, from a snapshot."""
    labels = ("tier", "kind")
    adapters = Rows("loraplex_tier_adapters", "Adapters in a tier.", "gauge", labels)
    sizes = Rows("loraplex_tier_bytes", "Bytes of adapters in a tier.", "gauge", labels)
    pages = Rows("loraplex_pool_adapter_pages", "Pages of adapters in the pool.", "gauge", ("kind",))
    from_the_start = (TierUse(tier, "lora", 0, 0) for tier in TIERS)
    uses = {(use.tier, use.kind): use for use in (*from_the_start, *stats.tiers)}
    for use in uses.values():
        adapters.add_metric((use.tier, use.kind), use.adapters)
        sizes.add_metric((use.tier, use.kind), use.bytes)
        if use.tier == "pool":
            pages.add_metric((use.kind,), use.pages)
    limits = Rows("loraplex_tier_limit_bytes", "Bytes that adapters may take in a tier.", "gauge", ("tier",))
    limits.add_metric(("host",), stats.host_bytes_limit)
    if stats.disk_bytes_limit:
        limits.add_metric(("disk",), stats.disk_bytes_limit)
    yield from (adapters, sizes, pages, limits)
    yield _counts(
        "loraplex_adapter_lookups",
        "Adapters of sequences that came in, by whether a tier had them.",
        "result",
        stats.lookups,
        LOOKUPS,
    )
    yield _counts("loraplex_adapter_evictions", "Adapters that left a tier.", "reason", stats.evictions, EVICTIONS)


def _counts(name: str, text: str, label: str, counts: Iterable[TierCount], known: Iterable[tuple[str, str]]) -> Rows:
    """A counter by tier and something else; the known ones are there from the start."""
    values = dict.fromkeys(known, 0) | {(count.tier, count.what): count.count for count in counts}
    family = Rows(name, text, "counter", ("tier", label))
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
