"""What each tenant asks for and gets, for Prometheus: as many tenants as the settings name, all from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from loraplex.server.exposition import Family, LiveTimes, Rows
from loraplex.server.histogram import Histogram

GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
CLIENT_GONE = 499

Outcome = Literal["finished", "failed", "refused", "invalid", "aborted"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "failed", "refused", "invalid", "aborted")
SERVER_FAULTS = frozenset({"server_error", "overloaded_error"})
TENANT_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Fewer than elsewhere: these series are multiplied by the tenants."""


def outcome_of(status: int, error_type: str | None) -> Outcome:
    """How a request ended: ``refused`` is a full queue, ``invalid`` the client's fault, ``failed`` ours.

    Args:
        status: of the answer; 499 where the client went away first.
        error_type: of the error, also where it came in mid-stream, after a status of 200.
    """
    if status == CLIENT_GONE:
        return "aborted"
    if status == 429:
        return "refused"
    if status >= 500 or (status < 400 and error_type in SERVER_FAULTS):
        return "failed"
    return "invalid" if status >= 400 or error_type is not None else "finished"


class TenantCounts:
    """Of one tenant. A request is waiting until its first token, running from then on."""

    __slots__ = ("cached", "first_token", "generated", "outcomes", "prompt", "running", "waiting")

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self.prompt = self.generated = self.cached = self.waiting = self.running = 0
        self.first_token = Histogram(TENANT_BUCKETS)

    def request_began(self, prompt_tokens: int) -> None:
        """A generation was handed to the engine."""
        self.prompt += prompt_tokens
        self.waiting += 1

    def first_token_came(self, seconds: float) -> None:
        """The first token of such a request came, ``seconds`` after the request."""
        self.waiting -= 1
        self.running += 1
        self.first_token.observe(seconds)

    def request_ended(self, cached_tokens: int, *, had_tokens: bool) -> None:
        """Such a request is over, in whatever way."""
        self.cached += cached_tokens
        if had_tokens:
            self.running -= 1
        else:
            self.waiting -= 1


class _FirstTokens(LiveTimes):
    """Seconds to the first token, of each tenant."""

    def __init__(self, tenants: Mapping[str, TenantCounts]) -> None:
        name, text = "loraplex_tenant_time_to_first_token_seconds", "From the request to its first token."
        super().__init__(name, text, ("tenant",))
        self._tenants = tenants

    def values(self) -> Iterable[tuple[tuple[str, ...], Histogram]]:
        return (((name,), counts.first_token) for name, counts in self._tenants.items())


class TenantMetrics:
    """The counts of all tenants.

    Args:
        names: of the tenants.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._tenants = {name: TenantCounts() for name in names}
        self._first_tokens = _FirstTokens(self._tenants)

    def __getitem__(self, name: str) -> TenantCounts:
        return self._tenants[name]

    def request_answered(self, name: str | None, path: str, status: int, error_type: str | None) -> None:
        """A request is over. Counts those for generation, of whom a tenant is known."""
        if name is not None and path in GENERATION_PATHS:
            self._tenants[name].outcomes[outcome_of(status, error_type)] += 1

    def families(self) -> Iterator[Family]:
        """All families."""
        labels = ("tenant", "outcome")
        requests = Rows("loraplex_tenant_requests", "Generation requests by how they ended.", "counter", labels)
        for name, counts in self._tenants.items():
            for outcome, number in counts.outcomes.items():
                requests.add_metric((name, outcome), number)
        yield requests
        yield self._counter("prompt_tokens", "Tokens of prompts.", lambda counts: counts.prompt)
        yield self._counter(
            "cached_tokens", "Tokens of prompts whose K/V was found in the pool.", lambda counts: counts.cached
        )
        yield self._counter("generation_tokens", "Tokens generated.", lambda counts: counts.generated)
        yield self._gauge("waiting", "Requests that wait for their first token.", lambda counts: counts.waiting)
        yield self._gauge("running", "Requests that have had their first token.", lambda counts: counts.running)
        yield self._first_tokens

    def _counter(self, name: str, text: str, value: Callable[[TenantCounts], int]) -> Family:
        return self._rows(f"loraplex_tenant_{name}", text, "counter", value)

    def _gauge(self, state: str, text: str, value: Callable[[TenantCounts], int]) -> Family:
        return self._rows(f"loraplex_tenant_requests_{state}", text, "gauge", value)

    def _rows(self, name: str, text: str, kind: str, value: Callable[[TenantCounts], int]) -> Family:
        family = Rows(name, text, kind, ("tenant",))
        for tenant, counts in self._tenants.items():
            family.add_metric((tenant,), value(counts))
        return family
