"""The records of tiers run at a tiny size, and hold together."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tests" / "bench"


@pytest.fixture
def record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Runs ``bench_tiers.py`` with arguments at a tiny size, in this process, and returns what its last line says."""
    monkeypatch.syspath_prepend(BENCH)
    bench = importlib.import_module("bench_tiers")
    tiny = ("--base", "tiny", "--inline", "--threads", "1", "--folder", str(tmp_path))

    def run(name: str, *arguments: str) -> dict[str, Any]:
        assert bench.main([name, *tiny, *arguments]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["record"] == name
        return found

    return run


def test_a_quarter_of_the_adapters_is_compared_with_all_of_them(record: Callable[..., dict[str, Any]]) -> None:
    arguments = "--adapters 8 --prompt 8 --out 2 --in-flight 4 --seconds 1 --rounds 1 --exponents 0 --load 0.3"
    lines = record("quarter", *arguments.split())["popularity"]["uniform"]
    assert set(lines) == {"all", "a quarter", "a quarter, LRU", "a quarter, host of half"}
    requests = {line["requests"] for line in lines.values()}
    assert len(requests) == 1, "every line has the same trace"
    assert requests.pop() > 0
    assert all(line["failures"] == 0 and line["p99_s"] >= line["p50_s"] > 0 for line in lines.values())
    assert lines["all"]["median_over_all"] == 1
    assert lines["all"]["counts"]["pool miss"] == 0, "a pool of all adapters loads none"
    assert lines["a quarter"]["counts"]["disk to host"] == 0, "the host has all adapters"


def test_many_adapters_are_all_touched_within_budgets(record: Callable[..., dict[str, Any]]) -> None:
    arguments = "--adapters 40 --few 6 --requests 48 --slices 2 --in-flight 8 --prompt 8 --out 4 --profile"
    found = record("tenthousand", *arguments.split())
    trace, memory = found["trace"], found["memory"]
    assert trace["touched"] == found["registry"]["registered"] == 40
    assert len(trace["slice_ratios"]) == 2
    assert trace["lines"]["few"]["counts"]["disk to host"] == 0, "the few are read beforehand"
    assert trace["lines"]["many"]["counts"]["disk to host"] > 0
    assert memory["pool_bytes"] + memory["host_bytes"] < memory["all_images_bytes"]
    assert any(name.endswith("schedule") for name in found["profile"])
