"""Families that write themselves say what prometheus_client would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from loraplex.server.exposition import FamilyTexts, LiveCounts, LiveTimes, Rows
from loraplex.server.histogram import Histogram

LABEL = st.text(max_size=8) | st.sampled_from(['a"b', "a\\b", "a\nb", "50%", "%d", "{}", "é", ""])


class Counter(LiveCounts):
    """A counter over a dictionary."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__("requests", "Requests.", "counter", labels)
        self.found: dict[tuple[str, ...], float] = {}

    def values(self) -> Iterable[tuple[tuple[str, ...], float]]:
        return self.found.items()


class Times(LiveTimes):
    """Histograms over a dictionary."""

    def __init__(self) -> None:
        super().__init__("seconds", "Seconds.", ("z", "kind"))
        self.found: dict[tuple[str, ...], Histogram] = {}

    def values(self) -> Iterable[tuple[tuple[str, ...], Histogram]]:
        return self.found.items()


class Alone:
    """Families as a collector."""

    def __init__(self, *families: Any) -> None:
        self.families = families

    def collect(self) -> Iterator[Any]:
        return iter(self.families)


def means(text: str) -> list[Any]:
    families = [
        (one.name, one.type, one.documentation, list(one.samples)) for one in text_string_to_metric_families(text)
    ]
    assert families
    return families


@given(st.dictionaries(st.tuples(LABEL, LABEL), st.integers(0, 1 << 60) | st.floats(0, 1e12), max_size=5))
def test_counters_and_gauges_mean_what_the_library_writes(values: dict[tuple[str, str], float]) -> None:
    live, rows = Counter(("b", "a")), Rows("held", "Held \\ pages.", "gauge", ("b", "a"))
    live.found |= values
    for labels, value in values.items():
        rows.add_metric(labels, value)
    assert means(FamilyTexts().write([live, rows])) == means(generate_latest(Alone(live, rows)).decode())


@given(st.dictionaries(st.tuples(LABEL, LABEL), st.lists(st.floats(0, 400), min_size=1, max_size=9), max_size=3))
def test_histograms_mean_what_the_library_writes_after_each_value(values: dict[tuple[str, str], list[float]]) -> None:
    times, texts = Times(), FamilyTexts()
    times.found = {labels: Histogram() for labels in values}
    for at in range(10):
        for labels, seconds in values.items():
            for one in seconds[at : at + 1]:
                times.found[labels].observe(one)
        assert means(texts.write([times])) == means(generate_latest(Alone(times)).decode())


def test_a_histogram_with_more_than_a_million_values_is_written_in_full() -> None:
    times = Times()
    times.found["a", "b"] = Histogram()
    times.found["a", "b"]._counts[0] = times.found["a", "b"].count = 12_345_678
    assert means(times.text()) == means(generate_latest(Alone(times)).decode())


def test_other_formats_are_the_librarys() -> None:
    live = Counter(("a",))
    live.found["x",] = 3
    [family] = openmetrics_families(openmetrics(Alone(live)).decode())
    assert [(one.name, one.labels, one.value) for one in family.samples] == [("requests_total", {"a": "x"}, 3)]


def test_a_plain_family_is_written_again_only_if_it_is_another_object() -> None:
    texts = FamilyTexts()
    foreign = GaugeMetricFamily("foreign", "From elsewhere.", value=1)
    rows = Rows("rows", "Rows.", "gauge")
    rows.add_metric((), 1)
    before = texts.write([foreign, rows])
    foreign.samples.clear()
    rows.add_metric((), 2)
    assert texts.write([foreign, rows]) == before
    changed = GaugeMetricFamily("foreign", "From elsewhere.", value=2)
    assert "foreign 2" in texts.write([changed])


def test_a_registry_takes_such_families() -> None:
    class Collector(Alone):
        def describe(self) -> Iterator[Any]:
            return iter(())

    registry = CollectorRegistry()
    live = Counter(())
    live.found[()] = 5
    registry.register(Collector(live))
    assert registry.get_sample_value("requests_total") == 5
