"""Grafana dashboards from few words: rows of panels, a panel of queries. What they all have in common stands here once.

Panels flow from left to right, and on to the next line where the 24 columns of Grafana are used up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = 24
HEIGHTS = {"stat": 4, "timeseries": 8, "bargauge": 8, "table": 8}
SCHEMA = 41
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
"""The servers that were chosen; in every query."""

GREEN, YELLOW, RED = "green", "yellow", "red"
Steps = Sequence[tuple[float | None, str]]


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. ``legend`` is Grafana's, as in ``{{tenant}}``."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Args:
        kind: of Grafana's: ``timeseries``, ``stat``, ``bargauge`` or ``table``.
        text: what it shows, and when to worry.
        unit: Grafana's id of a unit: s, bytes, percentunit, reqps, short ...
        steps: colours from a value on, the first from None; drawn as lines in a timeseries.
        stacked: one upon the other.
        width: columns of 24.
        most: end of the axis.
        decimals: shown.
        hidden: columns of a table that are not shown.
    """

    kind: str
    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    steps: Steps = ((None, GREEN),)
    stacked: bool = False
    width: int = 8
    most: float | None = None
    decimals: int | None = None
    hidden: tuple[str, ...] = ()

    def model(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        """What Grafana reads."""
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": HEIGHTS[self.kind]},
            "targets": [self._target(at, query) for at, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
            "transformations": self._transformations(),
        }

    def _target(self, at: int, query: Query) -> dict[str, Any]:
        instant = self.kind in {"table", "bargauge"}
        return {
            "refId": chr(ord("A") + at),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "instant": instant,
            "range": not instant,
            "format": "table" if self.kind == "table" else "time_series",
        }

    def _defaults(self) -> dict[str, Any]:
        has_limits = len(self.steps) > 1
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "min": 0,
            "color": {"mode": "palette-classic" if self.kind == "timeseries" else "thresholds"},
            "thresholds": {
                "mode": "absolute",
                "steps": [{"value": value, "color": colour} for value, colour in self.steps],
            },
        }
        if self.most is not None:
            defaults["max"] = self.most
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.kind == "timeseries":
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 40 if self.stacked else 8,
                "showPoints": "never",
                "spanNulls": False,
                "axisSoftMin": 0,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if has_limits else "off"},
            }
        return defaults

    def _options(self) -> dict[str, Any]:
        last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {
            "timeseries": {
                "legend": {
                    "displayMode": "table",
                    "placement": "bottom",
                    "showLegend": True,
                    "calcs": ["mean", "max", "lastNotNull"],
                },
                "tooltip": {"mode": "multi", "sort": "desc"},
            },
            "stat": {
                "reduceOptions": last,
                "colorMode": "value" if len(self.steps) > 1 else "none",
                "graphMode": "area",
                "textMode": "auto",
                "justifyMode": "auto",
                "orientation": "auto",
            },
            "bargauge": {
                "reduceOptions": last,
                "displayMode": "basic",
                "orientation": "horizontal",
                "valueMode": "color",
                "showUnfilled": True,
            },
            "table": {"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
        }[self.kind]

    def _transformations(self) -> list[dict[str, Any]]:
        if self.kind != "table":
            return []
        names = {f"Value #{chr(ord('A') + at)}": query.legend for at, query in enumerate(self.queries)}
        excluded = dict.fromkeys(("Time", *self.hidden), True)
        return [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": excluded, "renameByName": names | {"Value": "value"}}},
        ]


def graph(title: str, text: str, unit: str, *queries: Query, **options: Any) -> Panel:
    """Lines over time."""
    return Panel(kind="timeseries", title=title, text=text, unit=unit, queries=queries, **options)


def stat(title: str, text: str, unit: str, expr: str, **options: Any) -> Panel:
    """One number."""
    options.setdefault("width", 3)
    return Panel(kind="stat", title=title, text=text, unit=unit, queries=(Query(expr, title),), **options)


def bars(title: str, text: str, unit: str, *queries: Query, **options: Any) -> Panel:
    """A bar for each series, of its value now."""
    return Panel(kind="bargauge", title=title, text=text, unit=unit, queries=queries, **options)


def table(title: str, text: str, *queries: Query, **options: Any) -> Panel:
    """A line for each set of labels, a column for each label and query."""
    options.setdefault("width", COLUMNS)
    return Panel(kind="table", title=title, text=text, unit=options.pop("unit", "short"), queries=queries, **options)


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A dashboard.

    Args:
        name: of its file; its uid is ``loraplex-NAME``.
        variables: beside the data source, the namespace, the job and the instance: label and metric.
    """

    name: str
    title: str
    text: str
    rows: tuple[Row, ...]
    variables: dict[str, str] = field(default_factory=dict)

    def model(self) -> dict[str, Any]:
        """What Grafana reads."""
        return {
            "uid": f"loraplex-{self.name}",
            "title": f"Loraplex / {self.title}",
            "description": self.text,
            "tags": ["loraplex"],
            "schemaVersion": SCHEMA,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "fiscalYearStartMonth": 0,
            "links": [_links()],
            "annotations": {"list": [_restarts()]},
            "templating": {"list": list(self._variables())},
            "panels": list(self._panels()),
        }

    def _variables(self) -> Iterator[dict[str, Any]]:
        yield {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "hide": 0,
            "multi": False,
            "includeAll": False,
        }
        yield _variable("namespace", "loraplex_build_info")
        yield _variable("job", 'loraplex_build_info{namespace=~"$namespace"}')
        yield _variable("instance", 'loraplex_build_info{namespace=~"$namespace", job=~"$job"}')
        for label, metric in self.variables.items():
            yield _variable(label, f"{metric}{{{SELECTED}}}")

    def _panels(self) -> Iterator[dict[str, Any]]:
        y, panel_id = 0, 0
        for row in self.rows:
            panel_id += 1
            yield {
                "id": panel_id,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
                "panels": [],
            }
            x, y, tallest = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                panel_id += 1
                yield panel.model(panel_id, x, y)
                x, tallest = x + panel.width, max(tallest, HEIGHTS[panel.kind])
            y += tallest


def _variable(label: str, of: str) -> dict[str, Any]:
    """Values of a label; all of them unless some are chosen. ``.*`` also takes series that lack the label."""
    query = f"label_values({of}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": label},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _links() -> dict[str, Any]:
    return {
        "title": "Loraplex",
        "type": "dashboards",
        "tags": ["loraplex"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
    }


def _restarts() -> dict[str, Any]:
    return {
        "name": "Engine restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": RED,
        "expr": f"changes(loraplex_engine_restarts_total{{{SELECTED}}}[$__rate_interval]) > 0",
        "titleFormat": "The engine was started again",
        "textFormat": "{{instance}}",
    }
