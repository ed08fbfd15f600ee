from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from loraplex.server.errors import EngineError, OverloadedError, UnavailableError
from loraplex.server.messages import AdapterRef
from loraplex.server.settings import Settings, SettingsError, load_settings
from loraplex.server.tenant_metrics import OUTCOMES, TENANT_BUCKETS, TenantCounts
from loraplex.server.tenants import DEFAULT_TENANT, TenantKey, Tenants, parse_tenant_keys

KEYS = (TenantKey("acme", "k-acme"), TenantKey("acme", "k-acme-new"), TenantKey("globex", "k-globex"))


def counts(client: TestClient, name: str) -> dict[str, float]:
    """The samples of one name that are not 0: by tenant, or by tenant and outcome."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == f"loraplex_tenant_{name}" and sample.value:
                found["/".join(filter(None, (sample.labels["tenant"], sample.labels.get("outcome"))))] = sample.value
    return found


def ask(client: TestClient, key: str, **body: Any) -> Any:
    return client.post(
        "/v1/completions", json={"prompt": "abc", "max_tokens": 2} | body, headers={"authorization": f"Bearer {key}"}
    )


@pytest.fixture
def guarded(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client(tenant_keys=KEYS, api_keys=frozenset({"k-unnamed"}))


def test_each_key_counts_for_its_tenant_and_keys_without_a_name_for_default(guarded: TestClient) -> None:
    for key in ("k-acme", "k-acme-new", "k-globex", "k-unnamed"):
        assert ask(guarded, key).status_code == 200
    assert counts(guarded, "requests_total") == {"acme/finished": 2, "globex/finished": 1, "default/finished": 1}
    assert counts(guarded, "prompt_tokens_total") == {"acme": 6, "globex": 3, "default": 3}
    assert counts(guarded, "generation_tokens_total") == {"acme": 4, "globex": 2, "default": 2}
    assert counts(guarded, "cached_tokens_total") == {"acme": 8, "globex": 4, "default": 4}
    assert counts(guarded, "time_to_first_token_seconds_count") == {"acme": 2, "globex": 1, "default": 1}


def test_unknown_keys_are_refused_and_count_for_nobody(guarded: TestClient) -> None:
    for header in ("", "Bearer", "Bearer acme", "Bearer acme:k-acme", "Basic k-acme", "Bearer k-acm"):
        assert guarded.post("/v1/completions", json={}, headers={"authorization": header}).status_code == 401
    assert counts(guarded, "requests_total") == {}


def test_on_an_open_server_everybody_is_default(client: TestClient) -> None:
    ask(client, "whatever")
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    client.get("/v1/models")
    assert counts(client, "requests_total") == {"default/finished": 2}


def test_requests_are_counted_by_how_they_end(guarded: TestClient, engine: Any) -> None:
    ask(guarded, "k-acme", prompt=7.5)
    ask(guarded, "k-acme", model="nobody")
    for error in (OverloadedError("full"), UnavailableError("starting"), EngineError("broke"), ValueError("a bug")):
        engine.script.error = error
        ask(guarded, "k-acme")
    engine.script.error_after = 1
    for error in (EngineError("broke"), UnavailableError("died")):
        engine.script.error = error
        assert ask(guarded, "k-acme", stream=True).status_code == 200
    assert counts(guarded, "requests_total") == {"acme/invalid": 2, "acme/refused": 1, "acme/failed": 5}


def test_a_draining_server_fails_requests_for_their_tenants(guarded: TestClient) -> None:
    guarded.app.state.edge.lifecycle.begin_drain()
    assert ask(guarded, "k-globex").status_code == 503
    assert counts(guarded, "requests_total") == {"globex/failed": 1}


def test_a_client_that_goes_away_has_aborted(serve: Callable[..., Any], engine: Any) -> None:
    server = serve(tenant_keys=KEYS)
    engine.script.delay = 0.02

    def shown(line: str) -> bool:
        return line in httpx2.get(f"{server.url}/metrics").text.splitlines()

    body = {"prompt": "a", "max_tokens": 200, "stream": True}
    with (
        httpx2.Client(base_url=server.url, headers={"authorization": "Bearer k-acme"}) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        assert shown('loraplex_tenant_requests_running{tenant="acme"} 1')
        assert shown('loraplex_tenant_requests_waiting{tenant="acme"} 0')
    deadline = time.monotonic() + 10
    while not shown('loraplex_tenant_requests_total{outcome="aborted",tenant="acme"} 1'):
        assert time.monotonic() < deadline
    assert shown('loraplex_tenant_requests_running{tenant="acme"} 0')


def test_all_tenants_are_there_from_the_start_and_no_others(make_client: Callable[..., TestClient]) -> None:
    for fields, names in (
        ({"tenant_keys": KEYS}, {"acme", "globex"}),
        ({"tenant_keys": KEYS, "api_keys": frozenset({"k"})}, {"acme", "globex", "default"}),
        ({}, {"default"}),
    ):
        families = text_string_to_metric_families(make_client(**fields).get("/metrics").text)
        samples = [one for family in families if "_tenant_" in family.name for one in family.samples]
        assert {one.labels["tenant"] for one in samples} == names
        # Outcomes; tokens and states; a histogram with its sum, count and last bucket.
        assert len(samples) == len(names) * (len(OUTCOMES) + 5 + len(TENANT_BUCKETS) + 3)


def test_an_open_request_waits_until_its_first_token_and_runs_from_then_on() -> None:
    tenant = TenantCounts()
    tenant.request_began(3)
    tenant.request_began(4)
    assert (tenant.waiting, tenant.running, tenant.prompt) == (2, 0, 7)
    tenant.first_token_came(0.2)
    assert (tenant.waiting, tenant.running) == (1, 1)
    tenant.request_ended(0, had_tokens=False)
    tenant.request_ended(2, had_tokens=True)
    assert (tenant.waiting, tenant.running, tenant.cached) == (0, 0, 2)


def test_the_log_names_the_tenant_and_never_the_key(guarded: TestClient, engine: Any) -> None:
    engine.script.error = ValueError("a bug")
    with capture_logs() as lines:
        ask(guarded, "k-acme")
    assert [line["tenant"] for line in lines if line["event"] == "request_failed"] == ["acme"]
    assert "k-acme" not in str(lines)


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def noted(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    tenants = Tenants(["k-unnamed"], KEYS)
    found = [tenants.of_key(key) for key in ("k-unnamed", "k-globex", "nobody's")]
    assert found == [DEFAULT_TENANT, "globex", None]
    assert len(compared) == 3 * 4


# Settings


def settings(*entries: str, **others: Any) -> Settings:
    return load_settings({"model": "base", "tenant_keys": list(entries), **others})


def test_keys_come_from_flags_files_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TENANT_KEYS", "acme:one,acme:two,globex:with:colon")
    expected = (TenantKey("acme", "one"), TenantKey("acme", "two"), TenantKey("globex", "with:colon"))
    assert load_settings({"model": "base"}).http_config().tenant_keys == expected


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        (["ok:key", "swordfish"], "entry 2 is not NAME:KEY"),
        (["swordfish:"], "entry 1 is not NAME:KEY"),
        ([":swordfish"], "the name in entry 1 must be"),
        (["Swordfish:key"], "the name in entry 1 must be"),
        (["-swordfish:key"], "the name in entry 1 must be"),
        ([f"{'a' * 64}:swordfish"], "the name in entry 1 must be"),
        (["a\n:swordfish"], "the name in entry 1 must be"),
        (["a: swordfish"], "the key in entry 1 begins or ends with a blank"),
        (["a:swordfish", "b:swordfish"], "the key in entry 2 is that of another tenant"),
    ],
)
def test_bad_entries_are_told_by_their_place_without_the_key(entries: list[str], what: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(*entries)
    assert caught.value.message.startswith(f"tenant_keys: {what}")
    assert "swordfish" not in caught.value.message.lower()


def test_a_key_has_a_name_or_none() -> None:
    with pytest.raises(SettingsError) as caught:
        settings("a:swordfish", api_keys="other,swordfish")
    assert "'api_keys' and in 'tenant_keys'" in caught.value.message
    assert "swordfish" not in caught.value.message


def test_tenant_keys_are_not_shown() -> None:
    given = settings("acme:swordfish")
    assert "swordfish" not in repr(given) + repr(given.http_config())


@given(st.text(max_size=80), st.text(max_size=10))
def test_whatever_stands_there_is_a_key_or_a_clear_error(name: str, key: str) -> None:
    try:
        [parsed] = parse_tenant_keys([f"{name}:{key}"])
    except ValueError as error:
        complaint = str(error)
    else:
        assert Tenants((), [parsed]).of_key(parsed.key) == parsed.tenant
        return
    assert "entry 1" in complaint


def test_a_key_may_stand_twice_under_one_name() -> None:
    assert parse_tenant_keys(["a:k", "a:k"]) == (TenantKey("a", "k"),)


def test_tenants_do_not_change_what_is_served(guarded: TestClient, registry: Any) -> None:
    registry.register(AdapterRef(name="green", path="/adapters/green"))
    texts = {ask(guarded, key, model="green").json()["choices"][0]["text"] for key in ("k-acme", "k-globex")}
    assert len(texts) == 1
