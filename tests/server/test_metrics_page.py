"""Scrapes share pages: many of them cost no more than a share of the loop, and none is stale for long."""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from loraplex.server.exposition import gauge
from loraplex.server.messages import AdapterRef, AdapterState, EngineStats
from loraplex.server.metrics_page import LONGEST_SECONDS, MAX_FORMATS, MetricsPage

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
COST = 0.001


class Source:
    """A gauge that counts how often it was asked for, and takes a millisecond of work each time."""

    def __init__(self) -> None:
        self.collected = 0
        self.value = 0
        self.now = 100.0
        self.work = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Any]:
        self.collected += 1
        self.work += COST
        yield gauge("value", "A value.", self.value)

    def describe(self) -> Iterator[Any]:
        return iter(())

    def page(self, share: float = 0.05) -> MetricsPage:
        return MetricsPage(self.registry, self.collect, share, lambda: self.now, lambda: self.work)


@pytest.fixture
def source() -> Source:
    return Source()


def test_two_scrapes_in_a_row_collect_once_and_a_change_appears_in_time(source: Source) -> None:
    page = source.page()
    first, _ = page.answer("", "")
    source.value = 7
    source.now += COST / 0.05 * 0.9
    assert (page.answer("", "")[0], source.collected) == (first, 1)
    source.now += COST / 0.05 * 0.2
    assert b"value 7" in page.answer("", "")[0]
    assert source.collected == 2


def test_a_page_that_takes_long_to_write_is_still_written_ten_times_a_second(source: Source) -> None:
    page = source.page(share=1e-6)
    page.answer("", "")
    source.now += LONGEST_SECONDS * 0.9
    page.answer("", "")
    assert source.collected == 1
    source.now += LONGEST_SECONDS * 0.2
    page.answer("", "")
    assert source.collected == 2


def test_scrapes_every_millisecond_keep_to_the_share(source: Source) -> None:
    page = source.page()
    for _ in range(1000):
        page.answer("", "")
        source.now += 0.001
    assert source.work <= 0.05 * 1.05


def test_a_client_that_takes_gzip_gets_the_same_page_packed(source: Source) -> None:
    page = source.page()
    plain, headers = page.answer("", "")
    packed, packed_headers = page.answer("", "br, gzip")
    assert gzip.decompress(packed) == plain
    assert "content-encoding" not in headers
    assert packed_headers["content-encoding"] == "gzip"
    assert page.answer("", "gzip")[0] is packed, "packed once"
    assert source.collected == 1


def test_formats_have_pages_of_their_own_and_do_not_pile_up(source: Source) -> None:
    page = source.page()
    assert page.answer(OPENMETRICS, "")[0].endswith(b"# EOF\n")
    assert page.answer("text/plain", "")[1]["content-type"].startswith("text/plain; version=0.0.4")
    for minor in range(50):
        page.answer(f"application/openmetrics-text; version=1.{minor}.0", "")
        assert len(page._pages) <= MAX_FORMATS


@pytest.mark.parametrize("version", ["x", "1.x", "", "1.0.0.0.0"])
def test_an_odd_version_in_the_accept_header_is_no_fault_of_the_server(client: TestClient, version: str) -> None:
    for kind in ("text/plain", "application/openmetrics-text"):
        answer = client.get("/metrics", headers={"accept": f"{kind}; version={version}"})
        assert (answer.status_code, "loraplex_engine_up" in answer.text) == (200, True)


def test_the_server_shares_pages_between_scrapes(make_client: Any) -> None:
    client = make_client(metrics_share=1e-9)
    metrics = client.app.state.edge.metrics
    first = client.get("/metrics")
    metrics.choice_finished("base", "stop")
    assert client.get("/metrics").text == first.text
    assert client.get("/metrics").headers["content-encoding"] == "gzip"


def test_a_page_names_the_endpoint_in_the_counter_of_requests(client: TestClient) -> None:
    client.get("/metrics")
    assert 'loraplex_http_requests_total{endpoint="/metrics",status="200"} 1' in client.get("/metrics").text


def test_writing_costs_a_fraction_of_what_the_librarys_writer_costs(
    make_client: Any, engine: Any, registry: Any
) -> None:
    metrics = make_client(metrics_compat="vllm").app.state.edge.metrics
    registry.register_all(AdapterRef(name=f"a{at}", path=f"/many/{at}") for at in range(100))
    engine.adapters.update([AdapterState(path=f"/many/{at}", revision=0, tier="pool") for at in range(100)])
    page = MetricsPage(metrics.registry, metrics.collect, share=math.inf)

    def seconds(write: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            metrics.tokens_came("base", 1, 0.01)
            engine.stats = EngineStats(running=1)
            started = time.process_time()
            write()
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(lambda: page.answer("", "gzip")) < seconds(lambda: generate_latest(metrics.registry)) / 3
