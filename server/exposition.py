"""Families of metrics that know their own text: what routers scrape every 50 ms must cost next to nothing.

The text means what prometheus_client's would, whose writer makes a dictionary and sorts it for each sample. Its other
formats (OpenMetrics, escaped names) are left to it: for these a family looks like one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]
_EXACT = 1 << 53
LIBRARY = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class Family:
    """A family whose samples are made only for writers that ask for them.

    Args:
        name: without ``_total``.
        documentation: one line.
        type: "counter", "gauge" or "histogram".
        labels: their names.
    """

    def __init__(self, name: str, documentation: str, type: str, labels: Sequence[str] = ()) -> None:  # noqa: A002
        self.name = name
        self.documentation = documentation
        self.type = type
        self.unit = ""
        self.labels = tuple(labels)
        self._total = f"{name}_total" if type == "counter" else name
        text = documentation.replace("\\", "\\\\").replace("\n", "\\n")
        self._head = f"# HELP {self._total} {text}\n# TYPE {self._total} {type}\n"

    @property
    def samples(self) -> list[object]:
        """As prometheus_client has them."""
        return list(self.library_family().samples)

    def library_family(self) -> Metric:
        """The same as a family of prometheus_client."""
        raise NotImplementedError

    def text(self) -> str:
        """The family in the text format, as it is now."""
        raise NotImplementedError

    def _prefix(self, suffix: str, values: Labels, **more: str) -> str:
        """A sample's line up to its value. Labels in the order of their names, as prometheus_client has them."""
        named = sorted((*zip(self.labels, values, strict=True), *more.items()))
        inside = ",".join(f'{name}="{_escape(value)}"' for name, value in named)
        return f"{self._total}{suffix}{{{inside}}} " if inside else f"{self._total}{suffix} "


class Rows(Family):
    """A counter or a gauge: one row for each set of label values. Filled once, like a family of prometheus_client."""

    def __init__(self, name: str, documentation: str, type: str, labels: Sequence[str] = ()) -> None:  # noqa: A002
        super().__init__(name, documentation, type, labels)
        self._rows: list[tuple[Labels, float]] = []

    def add_metric(self, values: Sequence[str], value: float) -> None:
        """One more row."""
        self._rows.append((tuple(values), value))

    def __len__(self) -> int:
        return len(self._rows)

    def library_family(self) -> Metric:
        family = LIBRARY[self.type](self.name, self.documentation, labels=self.labels)
        for values, value in self._rows:
            family.add_metric(values, value)
        return family

    def text(self) -> str:
        prefix = self._prefix
        lines = [f"{prefix('', values)}{_number(value)}\n" for values, value in self._rows]
        return self._head + "".join(lines)


def gauge(name: str, documentation: str, value: float) -> Rows:
    """A gauge without labels."""
    family = Rows(name, documentation, "gauge")
    family.add_metric((), value)
    return family


class LiveCounts(Family):
    """A counter or a gauge whose values go on changing; its label sets only ever become more."""

    def __init__(self, name: str, documentation: str, type: str, labels: Sequence[str] = ()) -> None:  # noqa: A002
        super().__init__(name, documentation, type, labels)
        self._lines: dict[Labels, str] = {}

    def values(self) -> Iterable[tuple[Labels, float]]:
        """Label values and what is counted under them, as they are now."""
        raise NotImplementedError

    def library_family(self) -> Metric:
        family = LIBRARY[self.type](self.name, self.documentation, labels=self.labels)
        for labels, value in self.values():
            family.add_metric(labels, value)
        return family

    def text(self) -> str:
        known = self._lines
        lines = [self._head]
        for labels, value in self.values():
            prefix = known.get(labels)
            if prefix is None:
                prefix = known[labels] = self._prefix("", labels)
            lines.append(f"{prefix}{_number(value)}\n")
        return "".join(lines)


class Distribution(Protocol):
    """A histogram's content."""

    @property
    def count(self) -> int: ...

    @property
    def sum(self) -> float: ...

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound -> how many values are not above it, the last one for all."""
        ...


class LiveTimes(Family):
    """A histogram whose values go on changing."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, documentation, "histogram", labels)
        self._forms: dict[Labels, str] = {}
        self._parts: dict[Labels, tuple[int, str]] = {}

    def values(self) -> Iterable[tuple[Labels, Distribution]]:
        """Label values and the histogram under them, as they are now."""
        raise NotImplementedError

    def library_family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, one in self.values():
            family.add_metric(labels, buckets=one.buckets(), sum_value=one.sum)
        return family

    def text(self) -> str:
        return self._head + "".join([self._part(labels, one) for labels, one in self.values()])

    def _part(self, labels: Labels, one: Distribution) -> str:
        """The lines of one histogram, written anew only if a value came."""
        count = one.count
        known = self._parts.get(labels)
        if known is not None and known[0] == count:
            return known[1]
        buckets = one.buckets()
        text = self._form_of(labels, buckets) % (*(value for _, value in buckets), count, _number(one.sum))
        self._parts[labels] = count, text
        return text

    def _form_of(self, labels: Labels, buckets: Sequence[tuple[str, float]]) -> str:
        """The lines with places for their values, which are filled in one go."""
        form = self._forms.get(labels)
        if form is None:
            prefixes = [self._prefix("_bucket", labels, le=bound) for bound, _ in buckets]
            counts = [*prefixes, self._prefix("_count", labels)]
            lines = [*(f"{_literal(prefix)}%d" for prefix in counts), f"{_literal(self._prefix('_sum', labels))}%s\n"]
            form = self._forms[labels] = "\n".join(lines)
        return form


class FamilyTexts:
    """Writes families one after another. A plain one that was already there the last time is not written again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Rows | Metric, str]] = {}

    def write(self, families: Iterable[Family | Metric]) -> str:
        """All of them in the text format."""
        return "".join([self._text(family) for family in families])

    def _text(self, family: Family | Metric) -> str:
        if isinstance(family, LiveCounts | LiveTimes):
            return family.text()
        known = self._known.get(family.name)
        if known is not None and known[0] is family:
            return known[1]
        text = family.text() if isinstance(family, Rows) else generate_latest(_Alone(family)).decode()
        self._known[family.name] = family, text
        return text


class _Alone:
    """One family as a collector."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _number(value: float) -> str:
    """Whole numbers as they are, where a reader's float is the same number."""
    if isinstance(value, int) and not isinstance(value, bool) and -_EXACT <= value <= _EXACT:
        return str(value)
    return str(floatToGoString(value))


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def _escape(value: str) -> str:
    if "\\" in value or "\n" in value or '"' in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value
