from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    """A program of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def soak_identity() -> ModuleType:
    return load("soak_identity")


def steps(subject: Any, count: int) -> None:
    for _ in range(count):
        subject.step()


@pytest.mark.parametrize("by_value", [True, False], ids=["by_worth", "least_recently_used"])
def test_nothing_is_ever_hit_under_another_identity_or_salt(soak_identity: ModuleType, by_value: bool) -> None:
    subject = soak_identity.soak(10_000, seed=5, by_value=by_value, check_every=1000)
    # The soak says something only where there were hits, evictions of every kind and reloads.
    counts = subject.counts
    assert counts["adapter_hits"] > 500
    assert counts["prefix_hit_pages"] > 500
    assert min(counts["reloads"], counts["aliases"]) > 500
    assert set(subject.adapters.evictions_by_reason) == {"room", "dropped", "price"}
    assert set(subject.kv.prefixes.evicted_pages) == {"room", "dropped"}


def test_the_soak_sees_a_prefix_that_is_hit_under_another_salt(
    soak_identity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = soak_identity.PageChain
    monkeypatch.setattr(soak_identity, "PageChain", lambda *args, **options: real(*args, **{**options, "scope": ""}))
    with pytest.raises(AssertionError, match=r"hit under another name|other content"):
        soak_identity.soak(2000, seed=5)


def test_the_soak_sees_pages_of_a_content_that_was_reloaded(
    soak_identity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = soak_identity.Soak(5)
    # A registry that tells the caches names where it should tell identities.
    monkeypatch.setattr(subject, "_admit", lambda identity: type(subject)._admit(subject, f"{identity[:1]:0<32}"))
    monkeypatch.setattr(subject.adapters, "unpin", lambda identity: None)
    real = soak_identity.PageChain
    options: dict[str, object] = {"content": "name"}
    monkeypatch.setattr(soak_identity, "PageChain", lambda *args, **given: real(*args, **{**given, **options}))
    with pytest.raises(AssertionError, match=r"hit under another name|other content"):
        steps(subject, 2000)
