"""Whether requests are answered, how fast, and by what."""

from __future__ import annotations

from board import GREEN, RED, YELLOW, Board, Query, Row, graph, stat, table
from expressions import growth, quantile, quantiles, rate, series, share, total

BAD = 'outcome=~"failed|refused"'
OURS = 'outcome=~"finished|failed|refused"'
REQUESTS = "tenant_requests_total"
CHOSEN = 'namespace=~"$namespace", job=~"$job"'
FIRST = "time_to_first_token_seconds"


def recorded(name: str, window: str) -> Query:
    """A share that the recording rules keep, of all servers of a job."""
    return Query(f"namespace_job:loraplex_{name}:ratio_rate{window}{{{CHOSEN}}}", f"{{{{job}}}} {window}")


NOW = Row(
    "Now",
    (
        stat(
            "Servers ready",
            "Servers whose engine can take requests.",
            "short",
            total("engine_up"),
            steps=((None, RED), (1, GREEN)),
        ),
        stat("Requests", "Generation requests that ended, each second.", "reqps", rate(REQUESTS), decimals=2),
        stat(
            "Failed or refused",
            "Share of the requests that are not the client's fault. The objective is less than 0.5 %.",
            "percentunit",
            share(rate(REQUESTS, BAD), rate(REQUESTS, OURS)),
            steps=((None, GREEN), (0.005, YELLOW), (0.07, RED)),
            decimals=2,
        ),
        stat(
            "First token, p95",
            "Nineteen in twenty requests have their first token within this time. The objective is 2.5 s.",
            "s",
            quantile(0.95, FIRST),
            steps=((None, GREEN), (1, YELLOW), (2.5, RED)),
        ),
        stat(
            "Tokens generated",
            "Each second, of all choices.",
            "suffix: tok/s",
            rate("generation_tokens_total"),
            decimals=1,
        ),
        stat("Running", "Sequences in the batches.", "short", total("requests_running")),
        stat(
            "Waiting",
            "Sequences that wait for their turn.",
            "short",
            total("requests_waiting"),
            steps=((None, GREEN), (10, YELLOW), (100, RED)),
        ),
        stat(
            "Pool held",
            "Share of the pools' pages that cannot be had for the asking: of running sequences, adapters in use and "
            "pinned adapters.",
            "percentunit",
            share(total("pool_held_pages"), total("pool_capacity_pages")),
            steps=((None, GREEN), (0.8, YELLOW), (0.95, RED)),
            most=1,
            decimals=1,
        ),
    ),
)

OBJECTIVES = Row(
    "Objectives (needs the recording rules)",
    (
        graph(
            "Failed or refused requests",
            "Share of the requests that are not the client's fault, over three windows. The line is the objective: "
            "above it, the budget of a month does not last a month.",
            "percentunit",
            *(recorded("requests_failed", window) for window in ("5m", "1h", "6h")),
            steps=((None, GREEN), (0.005, RED)),
        ),
        graph(
            "Late first tokens",
            "Share of the requests that waited for their first token for more than 2.5 s. The line is the objective.",
            "percentunit",
            *(recorded("first_tokens_late", window) for window in ("5m", "1h", "6h")),
            steps=((None, GREEN), (0.05, RED)),
        ),
        graph(
            "Alerts",
            "Alerts of Loraplex that are firing; docs/alerts.md has what to do.",
            "short",
            Query(
                f'count by (alertname) (ALERTS{{alertname=~"Loraplex.*", alertstate="firing", {CHOSEN}}})'
                ' or label_replace(vector(0), "alertname", "none", "", "")',
                "{{alertname}}",
            ),
            decimals=0,
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        graph(
            "Requests by outcome",
            "Generation requests that ended. failed: our fault; refused: 429; invalid: the client's fault; aborted: "
            "the client went away.",
            "reqps",
            Query(rate(REQUESTS, by="outcome"), "{{outcome}}"),
            stacked=True,
        ),
        graph(
            "HTTP answers by status",
            "All routes but /metrics and the probes; 499 is a client that went away.",
            "reqps",
            Query(
                rate("http_requests_total", 'endpoint!~"/metrics|/health|/livez|/readyz|/ping"', by="status"),
                "{{status}}",
            ),
            stacked=True,
        ),
        graph(
            "Errors by type",
            "Answers with an error, also in the middle of a stream. Probes of a server that is not ready count.",
            "reqps",
            Query(rate("errors_total", by="type"), "{{type}}"),
        ),
    ),
)

LATENCY = Row(
    "Times",
    (
        graph(
            "First token",
            "From the request to its first token: queue, adapter, prompt. The line is the objective for p95.",
            "s",
            *quantiles(FIRST, 0.5, 0.95, 0.99),
            steps=((None, GREEN), (2.5, RED)),
        ),
        graph(
            "First token by kind, p95",
            "Requests with adapters beside those without: their distance is what adapters cost.",
            "s",
            Query(quantile(0.95, FIRST, by="kind"), "{{kind}}"),
        ),
        graph(
            "Between tokens",
            "Time between two outputs of a choice.",
            "s",
            *quantiles("inter_token_seconds", 0.5, 0.95, 0.99),
        ),
        graph(
            "In the queue",
            "From the request to its first step.",
            "s",
            *quantiles("request_queue_seconds", 0.5, 0.95, 0.99),
        ),
        graph("Whole request", "From the request to its end.", "s", *quantiles("request_seconds", 0.5, 0.95, 0.99)),
        graph("Step", "One step of the engine, of whatever size.", "s", *quantiles("step_seconds", 0.5, 0.95, 0.99)),
    ),
)

WORK = Row(
    "Work",
    (
        graph(
            "Tokens",
            "Prompt tokens that came in, those of them that were found in the pool, and tokens that went out.",
            "suffix: tok/s",
            Query(rate("prompt_tokens_total"), "prompt"),
            Query(rate("prefix_hit_tokens_total"), "prompt, found in the pool"),
            Query(rate("generation_tokens_total"), "generated"),
        ),
        graph(
            "Sequences",
            "In the batches, and waiting for their turn. A queue that keeps growing wants a server more.",
            "short",
            Query(total("requests_running"), "running"),
            Query(total("requests_waiting"), "waiting"),
        ),
        graph(
            "Tokens by kind of request",
            "Tokens generated for requests with adapters and without.",
            "suffix: tok/s",
            Query(rate("generation_tokens_total", by="kind"), "{{kind}}"),
            stacked=True,
        ),
        graph(
            "Pages of the pools",
            "By use. Cached prefixes and idle adapters are put out when pages are wanted.",
            "short",
            Query(total("pool_pages", by="use"), "{{use}}"),
            stacked=True,
        ),
        graph(
            "Steps",
            "Steps of the engines each second.",
            "cps",
            Query(rate("steps_total", by="instance"), "{{instance}}"),
        ),
        graph(
            "Choices by how they ended",
            "stop: the model or a stop string ended it; length: max_tokens.",
            "cps",
            Query(rate("choices_finished_total", by="reason"), "{{reason}}"),
            stacked=True,
        ),
    ),
)

SERVERS = Row(
    "Servers",
    (
        table(
            "Servers",
            "What runs where, and how it is.",
            Query(f"max by (instance, version, architecture, dtype, device) ({series('build_info')})", "info"),
            Query(total("engine_up", by="instance"), "ready"),
            Query(total("draining", by="instance"), "draining"),
            Query(total("http_requests_in_flight", by="instance"), "in flight"),
            Query(total("adapters_registered", by="instance"), "adapters"),
            Query(growth("engine_restarts_total", by="instance"), "engine restarts in the time shown"),
            hidden=("Value #A",),
        ),
    ),
)

BOARD = Board(
    name="overview",
    title="Overview",
    text="Whether requests are answered, how fast, and by what.",
    rows=(NOW, OBJECTIVES, TRAFFIC, LATENCY, WORK, SERVERS),
)
