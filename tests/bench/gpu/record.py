"""A record: one measured figure beside its floor and its aim; and the table of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One figure.

    Attributes:
        name: what was measured.
        measured: None where it could not be; ``reason`` says why.
        unit: of the figure, its floor and its aim.
        floor: what the measured ceilings allow at best.
        aim: to be reached; None where there is none.
        higher_is_better: whether the aim is a least value.
        reason: why there is no figure.
        details: further figures.
    """

    name: str
    measured: float | None
    unit: str
    floor: float | None = None
    aim: float | None = None
    higher_is_better: bool = False
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None where there is no aim or no figure."""
        if self.aim is None or self.measured is None:
            return None
        return self.measured >= self.aim if self.higher_is_better else self.measured <= self.aim

    @property
    def share_of_floor(self) -> float | None:
        """How close to the floor, 1 at best."""
        if not self.floor or not self.measured:
            return None
        return self.measured / self.floor if self.higher_is_better else self.floor / self.measured

    def as_json(self) -> dict[str, Any]:
        """Its fields, rounded, with what follows from them."""
        return {
            "name": self.name,
            "measured": _rounded(self.measured),
            "unit": self.unit,
            "floor": _rounded(self.floor),
            "share_of_floor": _rounded(self.share_of_floor),
            "aim": self.aim,
            "met": self.met,
            "reason": self.reason,
            "details": {name: _rounded(value) for name, value in self.details.items()},
        }


def missing(name: str, reason: str) -> Record:
    """A record without a figure."""
    return Record(name=name, measured=None, unit="", reason=reason)


def table(records: Sequence[Record]) -> str:
    """All records, a line each."""
    lines = ["| what | measured | floor | of floor | aim | met |", "| --- | --- | --- | --- | --- | --- |"]
    for one in records:
        if one.measured is None:
            lines.append(f"| {one.name} | not measured: {one.reason} | | | | |")
            continue
        share = "" if one.share_of_floor is None else f"{one.share_of_floor:.0%}"
        aim = "" if one.aim is None else f"{'≥' if one.higher_is_better else '≤'} {one.aim:g}"
        met = {None: "", True: "yes", False: "NO"}[one.met]
        floor = "" if one.floor is None else f"{_rounded(one.floor):g}"
        lines.append(f"| {one.name} | {_rounded(one.measured):g} {one.unit} | {floor} | {share} | {aim} | {met} |")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
