"""Where adapters and K/V lie, what moves between the tiers, and what that costs."""

from __future__ import annotations

from board import GREEN, RED, YELLOW, Board, Query, Row, graph, stat, table
from expressions import growth, quantile, rate, series, share, total

ROOM = 'reason=~"room|price"'
PATH = "{{source}} to {{target}}"
LOOKUPS = "adapter_lookups_total"
LOADS = "adapter_load_seconds"

NOW = Row(
    "Now",
    (
        stat("Registered", "Adapters that requests may name.", "short", f"max({series('adapters_registered')})"),
        stat("In the pool", "Adapters in the pools, over all servers.", "short", total("tier_adapters", 'tier="pool"')),
        stat(
            "On the host", "Adapters in host memory, over all servers.", "short", total("tier_adapters", 'tier="host"')
        ),
        stat(
            "Found in the pool",
            "Share of the sequences' adapters that were in the pool when they came. Others wait for copies.",
            "percentunit",
            share(rate(LOOKUPS, 'tier="pool"', 'result="hit"'), rate(LOOKUPS, 'tier="pool"')),
            steps=((None, RED), (0.5, YELLOW), (0.9, GREEN)),
            most=1,
            decimals=1,
        ),
        stat(
            "Pool held",
            "Share of the pools' pages that cannot be had for the asking.",
            "percentunit",
            share(total("pool_held_pages"), total("pool_capacity_pages")),
            steps=((None, GREEN), (0.8, YELLOW), (0.95, RED)),
            most=1,
            decimals=1,
        ),
        stat(
            "Pool pinned",
            "Share of the pools' pages that belong to pinned adapters. At max_pinned_fraction, pins are refused.",
            "percentunit",
            share(total("pool_pinned_pages"), total("pool_capacity_pages")),
            steps=((None, GREEN), (0.3, YELLOW), (0.45, RED)),
            most=1,
            decimals=1,
        ),
        stat(
            "Preemptions",
            "Sequences put back because pages ran out, in the time that is shown.",
            "short",
            growth("preemptions_total"),
            steps=((None, GREEN), (1, YELLOW), (100, RED)),
            decimals=0,
        ),
        stat(
            "Failed loads",
            "Adapters that could not be read, in the time that is shown.",
            "short",
            growth("adapter_load_failures_total"),
            steps=((None, GREEN), (1, YELLOW), (10, RED)),
            decimals=0,
        ),
    ),
)

POOL = Row(
    "Pool",
    (
        graph(
            "Pages by use",
            "kv: of sequences; adapter: in use and idle; cached: prefixes that no sequence uses; free.",
            "short",
            Query(total("pool_pages", by="use"), "{{use}}"),
            stacked=True,
        ),
        graph(
            "Held, by server",
            "Share of the pages that cannot be had for the asking. Above 95 %, sequences wait or are preempted.",
            "percentunit",
            Query(share(series("pool_held_pages"), series("pool_capacity_pages")), "{{instance}}"),
            steps=((None, GREEN), (0.95, RED)),
            most=1,
        ),
        graph(
            "Preemptions",
            "Sequences put back each second because pages ran out; they are computed again.",
            "cps",
            Query(rate("preemptions_total", by="instance"), "{{instance}}"),
        ),
        graph(
            "Adapters' pages by kind",
            "Idle adapters included.",
            "short",
            Query(total("pool_adapter_pages", by="kind"), "{{kind}}"),
            stacked=True,
        ),
        graph(
            "Pinned pages",
            "Of adapters that an operator has pinned.",
            "short",
            Query(total("pool_pinned_pages", by="instance"), "{{instance}}"),
        ),
        graph(
            "Prompt tokens found in the pool",
            "Share of the prompts' tokens whose K/V was there already.",
            "percentunit",
            Query(share(rate("prefix_hit_tokens_total"), rate("prompt_tokens_total")), "found"),
            most=1,
        ),
    ),
)

TIERS = Row(
    "Tiers",
    (
        graph(
            "Adapters by tier",
            "An adapter may be in several tiers.",
            "short",
            Query(total("tier_adapters", by="tier"), "{{tier}}"),
        ),
        graph(
            "Use of a tier",
            "Bytes of adapters as a share of what the settings allow. A full cache is well; one that is full "
            "and evicts all the time is too small.",
            "percentunit",
            Query(
                f"{total('tier_bytes', by='tier')} / ({total('tier_limit_bytes', by='tier')} > 0)",
                "{{tier}}",
            ),
            most=1,
        ),
        graph(
            "Bytes by tier and kind",
            "Of adapters.",
            "bytes",
            Query(total("tier_bytes", by="tier, kind"), "{{tier}}, {{kind}}"),
            stacked=True,
        ),
        graph(
            "Found, by tier",
            "Share of the adapters of sequences that came in which the tier had.",
            "percentunit",
            Query(share(rate(LOOKUPS, 'result="hit"', by="tier"), rate(LOOKUPS, by="tier")), "{{tier}}"),
            most=1,
        ),
        graph(
            "Lookups",
            "Adapters of sequences that came in, each second, by whether the tier had them.",
            "cps",
            Query(rate(LOOKUPS, by="tier, result"), "{{tier}}, {{result}}"),
        ),
        graph(
            "Evictions",
            "Adapters that left a tier each second. room: for others; price: pinned, and yet for others; "
            "the rest: unloaded or replaced.",
            "cps",
            Query(rate("adapter_evictions_total", by="tier, reason"), "{{tier}}, {{reason}}"),
        ),
    ),
)

MOVES = Row(
    "Loads",
    (
        graph(
            "Loads",
            "Adapters that came from one tier to another, each second.",
            "cps",
            Query(rate(f"{LOADS}_count", by="source, target"), PATH),
        ),
        graph(
            "Time of a load, p50",
            "Half of the loads take no longer. There is no line where there was no load.",
            "s",
            Query(quantile(0.5, LOADS, by="source, target"), PATH),
        ),
        graph(
            "Time of a load, p95",
            "As above, 19 in 20. Alerts are at 30 s from a remote source, 5 s from disk, 1 s into the pool.",
            "s",
            Query(quantile(0.95, LOADS, by="source, target"), PATH),
        ),
        graph(
            "Evictions for each lookup",
            "Adapters put out of the pool for others, for each adapter that a sequence asked for. Above a quarter, the "
            "adapters in use do not fit.",
            "short",
            Query(share(rate("adapter_evictions_total", 'tier="pool"', ROOM), rate(LOOKUPS, 'tier="pool"')), "pool"),
            steps=((None, GREEN), (0.25, RED)),
        ),
        graph(
            "Paged in early",
            "Adapters paged into the pool, and those of them that came before a sequence needed them.",
            "cps",
            Query(rate("adapter_loads_total"), "paged in"),
            Query(rate("adapter_prefetches_total"), "early"),
        ),
        graph(
            "Failed loads",
            "Adapters that could not be read, each second.",
            "cps",
            Query(rate("adapter_load_failures_total", by="instance"), "{{instance}}"),
        ),
    ),
)

NAMES = Row(
    "By name",
    (
        table(
            "Adapters held",
            "Which adapters lie where: those that came last, as many as max_adapter_series says.",
            Query(f"max by (adapter, tier, pinned, instance) ({series('adapter_held')})", "held"),
            width=12,
            hidden=("Value",),
        ),
        graph(
            "Experts",
            "Times that routers chose an expert, each second, for the ten chosen most. Needs expert_metrics.",
            "cps",
            Query(f"topk(10, {rate('expert_tokens_total', by='adapter, expert')})", "{{adapter}}, {{expert}}"),
            width=12,
        ),
    ),
)

BOARD = Board(
    name="adapters-and-pool",
    title="Adapters and pool",
    text="Where adapters and K/V lie, what moves between the tiers, and what that costs.",
    rows=(NOW, POOL, TIERS, MOVES, NAMES),
)
