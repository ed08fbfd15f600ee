"""The forms that queries of the dashboards take, over the servers that were chosen."""

from __future__ import annotations

from board import SELECTED, Query


def series(name: str, *matchers: str) -> str:
    """A selector."""
    return f"loraplex_{name}{{{', '.join((SELECTED, *matchers))}}}"


def total(name: str, *matchers: str, by: str = "") -> str:
    """Sum of gauges."""
    return f"sum{_by(by)} ({series(name, *matchers)})"


def rate(name: str, *matchers: str, by: str = "") -> str:
    """Sum of a counter's growth each second."""
    return f"sum{_by(by)} (rate({series(name, *matchers)}[$__rate_interval]))"


def growth(name: str, *matchers: str, by: str = "") -> str:
    """Sum of a counter's growth over the time that is shown."""
    return f"sum{_by(by)} (increase({series(name, *matchers)}[$__range]))"


def share(part: str, whole: str) -> str:
    """A part of a whole; no value while there is no whole."""
    return f"{part} / ({whole} > 0)"


def quantile(number: float, name: str, *matchers: str, by: str = "") -> str:
    """A quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({number}, {rate(f'{name}_bucket', *matchers, by=labels)})"


def quantiles(name: str, *numbers: float) -> tuple[Query, ...]:
    """Several quantiles of a histogram."""
    return tuple(Query(quantile(number, name), f"p{number * 100:g}") for number in numbers)


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
