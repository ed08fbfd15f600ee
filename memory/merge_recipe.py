"""What a merged adapter is made of, as a text that stands where otherwise an adapter's folder does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from loraplex.memory.adapter_errors import AdapterFileError, shown

PREFIX = "merged:"

_MOST = 1e30

MergeStrategy = Literal["ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class MergeSource:
    """One adapter that goes into a merged one.

    Attributes:
        path: its folder.
        revision: counts the reloads of its name, so that a reload makes another recipe.
        weight: any finite number; a negative one takes the adapter away.
    """

    path: str
    revision: int
    weight: float


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """How to merge adapters, in the terms of PEFT's ``add_weighted_adapter``.

    Attributes:
        sources: at least one; their order counts where values are dropped at random.
        strategy: TIES (https://arxiv.org/abs/2306.01708), or DARE (https://arxiv.org/abs/2311.03099) followed by a sum
            or by TIES' election of signs.
        density: share of the values that are kept, above 0, at most 1.
        majority_sign: whether signs are elected by the sum of the values or by their count.
    """

    sources: tuple[MergeSource, ...]
    strategy: MergeStrategy
    density: float
    majority_sign: MajoritySign = "total"

    def to_path(self) -> str:
        """``merged:`` and canonical JSON: equal recipes give equal texts."""
        return PREFIX + json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, path: str) -> MergeRecipe:
        """The recipe that ``to_path`` wrote.

        Errors: AdapterFileError naming what is missing, unknown or out of range.
        """
        raw = _object(path)
        density = _number(raw, "density")
        if not 0 < density <= 1:
            raise _wrong("density", density, "a number above 0, at most 1")
        strategy = _choice(raw, "strategy", get_args(MergeStrategy))
        majority_sign = _choice(raw, "majority_sign", get_args(MajoritySign))
        return cls(_sources(raw["sources"]), strategy, density, majority_sign)


def _object(path: str) -> Mapping[str, object]:
    if not path.startswith(PREFIX):
        raise AdapterFileError(f"{shown(path)}: no recipe of a merged adapter; expected one that begins with {PREFIX}")
    try:
        raw = json.loads(path.removeprefix(PREFIX))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"recipe of a merged adapter: not valid JSON: {shown(str(error))}") from error
    return _keyed(raw, "recipe", [field.name for field in fields(MergeRecipe)])


def _keyed(raw: object, what: str, keys: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(raw, dict) or raw.keys() != set(keys):
        raise _wrong(what, raw, f"an object of {', '.join(keys)}")
    return raw


def _sources(raw: object) -> tuple[MergeSource, ...]:
    if not isinstance(raw, list) or not raw:
        raise _wrong("sources", raw, "a list of at least one")
    return tuple(_source(one) for one in raw)


def _source(raw: object) -> MergeSource:
    source = _keyed(raw, "sources", [field.name for field in fields(MergeSource)])
    path, revision = source["path"], source["revision"]
    if not isinstance(path, str) or path.startswith(PREFIX):
        raise _wrong("path", path, "the folder of an adapter that is not itself merged")
    if not isinstance(revision, int) or isinstance(revision, bool):
        raise _wrong("revision", revision, "an integer")
    return MergeSource(path, revision, _number(source, "weight"))


def _choice(raw: Mapping[str, object], key: str, choices: tuple[Any, ...]) -> Any:
    if raw[key] not in choices:
        raise _wrong(key, raw[key], f"one of {', '.join(choices)}")
    return raw[key]


def _number(raw: Mapping[str, object], key: str) -> float:
    value = raw[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST:
        return float(value)
    raise _wrong(key, value, "a finite number")


def _wrong(key: str, value: object, expected: str) -> AdapterFileError:
    message = f"{key} of a merged adapter's recipe: expected {expected}, got {shown(value)}"
    return AdapterFileError(message, key=key)
