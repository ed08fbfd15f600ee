"""What each tenant asks for, and what it gets. A tenant is the name of an API key."""

from __future__ import annotations

from board import GREEN, RED, YELLOW, Board, Query, Row, bars, graph, stat, table
from expressions import growth, quantile, rate, share, total

WHO = 'tenant=~"$tenant"'
BAD = 'outcome=~"failed|refused"'
OURS = 'outcome=~"finished|failed|refused"'
REQUESTS = "tenant_requests_total"
FIRST = "tenant_time_to_first_token_seconds"
EACH = "{{tenant}}"

NOW = Row(
    "Now",
    (
        stat(
            "Tenants that ask",
            "Tenants with a request that ended in the time that is shown.",
            "short",
            f"count({growth(REQUESTS, WHO, by='tenant')} > 0) or vector(0)",
            width=4,
        ),
        stat(
            "Requests",
            "Generation requests that ended, each second.",
            "reqps",
            rate(REQUESTS, WHO),
            width=4,
            decimals=2,
        ),
        stat(
            "Failed or refused",
            "Share of the requests that are not the client's fault.",
            "percentunit",
            share(rate(REQUESTS, WHO, BAD), rate(REQUESTS, WHO, OURS)),
            steps=((None, GREEN), (0.005, YELLOW), (0.07, RED)),
            width=4,
            decimals=2,
        ),
        stat(
            "First token, p95",
            "Nineteen in twenty requests have their first token within this time.",
            "s",
            quantile(0.95, FIRST, WHO),
            steps=((None, GREEN), (1, YELLOW), (2.5, RED)),
            width=4,
        ),
        stat(
            "Tokens generated",
            "Each second.",
            "suffix: tok/s",
            rate("tenant_generation_tokens_total", WHO),
            width=4,
            decimals=1,
        ),
        stat(
            "Open",
            "Requests that are being answered.",
            "short",
            f"{total('tenant_requests_waiting', WHO)} + {total('tenant_requests_running', WHO)}",
            width=4,
        ),
    ),
)

DEMAND = Row(
    "What they ask for",
    (
        graph(
            "Requests",
            "Generation requests that ended, each second.",
            "reqps",
            Query(rate(REQUESTS, WHO, by="tenant"), EACH),
            stacked=True,
        ),
        graph(
            "Prompt tokens",
            "Each second.",
            "suffix: tok/s",
            Query(rate("tenant_prompt_tokens_total", WHO, by="tenant"), EACH),
            stacked=True,
        ),
        graph(
            "Tokens generated",
            "Each second.",
            "suffix: tok/s",
            Query(rate("tenant_generation_tokens_total", WHO, by="tenant"), EACH),
            stacked=True,
        ),
        graph(
            "Waiting",
            "Requests that have not had their first token.",
            "short",
            Query(total("tenant_requests_waiting", WHO, by="tenant"), EACH),
            stacked=True,
        ),
        graph(
            "Running",
            "Requests that have had their first token.",
            "short",
            Query(total("tenant_requests_running", WHO, by="tenant"), EACH),
            stacked=True,
        ),
        graph(
            "Prompt tokens found in the pool",
            "Share of the prompts' tokens whose K/V was there already.",
            "percentunit",
            Query(
                share(
                    rate("tenant_cached_tokens_total", WHO, by="tenant"),
                    rate("tenant_prompt_tokens_total", WHO, by="tenant"),
                ),
                EACH,
            ),
            most=1,
        ),
    ),
)

SERVICE = Row(
    "What they get",
    (
        graph(
            "First token, p95",
            "Nineteen in twenty requests have their first token within this time. The line is the objective.",
            "s",
            Query(quantile(0.95, FIRST, WHO, by="tenant"), EACH),
            steps=((None, GREEN), (2.5, RED)),
        ),
        graph(
            "First token, p50",
            "Half of the requests have their first token within this time.",
            "s",
            Query(quantile(0.5, FIRST, WHO, by="tenant"), EACH),
        ),
        graph(
            "Failed or refused",
            "Share of the requests that are not the client's fault.",
            "percentunit",
            Query(share(rate(REQUESTS, WHO, BAD, by="tenant"), rate(REQUESTS, WHO, OURS, by="tenant")), EACH),
            steps=((None, GREEN), (0.005, RED)),
        ),
        graph(
            "Refused",
            "429, because the queue was full; each second.",
            "reqps",
            Query(rate(REQUESTS, WHO, 'outcome="refused"', by="tenant"), EACH),
        ),
        graph(
            "Invalid",
            "Requests that could not be served as they stood; each second.",
            "reqps",
            Query(rate(REQUESTS, WHO, 'outcome="invalid"', by="tenant"), EACH),
        ),
        graph(
            "Aborted",
            "Requests whose client went away; each second.",
            "reqps",
            Query(rate(REQUESTS, WHO, 'outcome="aborted"', by="tenant"), EACH),
        ),
    ),
)

SUMS = Row(
    "In the time that is shown",
    (
        bars(
            "Tokens",
            "Prompt and generated tokens of each tenant.",
            "short",
            Query(
                f"{growth('tenant_prompt_tokens_total', WHO, by='tenant')} + "
                f"{growth('tenant_generation_tokens_total', WHO, by='tenant')}",
                EACH,
            ),
            decimals=0,
        ),
        table(
            "Requests and tokens",
            "Sums; Prometheus interpolates, so that they may be off by a little.",
            *(
                Query(growth(REQUESTS, WHO, f'outcome="{one}"', by="tenant"), one)
                for one in ("finished", "failed", "refused", "invalid", "aborted")
            ),
            Query(growth("tenant_prompt_tokens_total", WHO, by="tenant"), "prompt tokens"),
            Query(growth("tenant_cached_tokens_total", WHO, by="tenant"), "found in the pool"),
            Query(growth("tenant_generation_tokens_total", WHO, by="tenant"), "generated tokens"),
            width=16,
            decimals=0,
        ),
    ),
)

BOARD = Board(
    name="tenants",
    title="Tenants",
    text="What each tenant asks for, and what it gets. A tenant is the name of an API key.",
    rows=(NOW, DEMAND, SERVICE, SUMS),
    variables={"tenant": "loraplex_tenant_requests_total"},
)
