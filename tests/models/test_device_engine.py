"""The engine over the GPU's kernels, in Triton's interpreter: the same answers as over plain operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef, LoadAdapter, WeightedAdapter

PROMPT = [7, 31, 5, 99, 12, 40]
LOGPROBS = 20

Answers = dict[str, list[tuple[list[int], list[float]]]]


def ref_of(name: str, paths: dict[str, Path]) -> AdapterRef:
    return AdapterRef(name=name, path=str(paths[name]))


def answers_of(driver: Any, requests: dict[str, dict[str, Any]], paths: dict[str, Path]) -> Answers:
    """Run requests together; their tokens and log-probabilities by name."""
    used = {name for request in requests.values() for name in request.get("adapters", {})}
    for name in sorted(used):
        driver.handle(LoadAdapter(call_id=f"load {name}", adapter=ref_of(name, paths)))
    driver.run()
    for name, request in requests.items():
        weights = request.get("adapters", {})
        is_mix = len(weights) > 1 or any(weight != 1 for weight in weights.values())
        mix = [WeightedAdapter(adapter=ref_of(part, paths), weight=w) for part, w in weights.items()]
        driver.generate(
            name,
            request.get("prompt", PROMPT),
            None if is_mix or not weights else ref_of(next(iter(weights)), paths),
            mix=mix if is_mix else [],
            logprobs=LOGPROBS,
            **{"max_tokens": 3, **request.get("params", {})},
        )
    driver.run()
    assert not driver.failed
    driver.check_idle()
    found: Answers = {}
    for (name, _), choice in sorted(driver.choices.items()):
        logprobs = [entry.logprob for entry in choice.logprobs]
        found.setdefault(name, []).append((choice.tokens, logprobs))
    return found


@pytest.fixture
def compare(
    make_engine: Callable[..., Any], interpreter: None
) -> Callable[[Any, dict[str, dict[str, Any]], dict[str, Path]], None]:
    """Both engines answer alike; the log-probabilities up to float32's rounding."""

    def run(checkpoint: Any, requests: dict[str, dict[str, Any]], paths: dict[str, Path], **settings: Any) -> None:
        plain = answers_of(make_engine(checkpoint, kernels="plain", **settings), requests, paths)
        device = answers_of(make_engine(checkpoint, kernels="triton", **settings), requests, paths)
        assert {name: [tokens for tokens, _ in found] for name, found in device.items()} == {
            name: [tokens for tokens, _ in found] for name, found in plain.items()
        }
        for name, found in device.items():
            for (_, logprobs), (_, expected) in zip(found, plain[name]):
                assert logprobs == pytest.approx(expected, abs=1e-4), name

    return run


def test_base_rows(checkpoints: Callable[[str], Any], compare: Any) -> None:
    requests = {
        "greedy": {"params": {"max_tokens": 6}},
        "long": {"prompt": PROMPT * 5, "params": {"max_tokens": 4}},
        "random": {"params": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_tokens": 5}},
    }
    compare(checkpoints("llama"), requests, {}, prefill_chunk=8)


@pytest.mark.parametrize("kind", ["lora", "dora", "mixlora", "mola", "meteora", "tokenwise", "alora"])
def test_a_kind_beside_base_rows(kind: str, checkpoints: Callable[[str], Any], every_kind: Any, compare: Any) -> None:
    checkpoint = checkpoints("llama")
    paths = every_kind(checkpoint)
    requests = {
        "base": {},
        "adapter": {"adapters": {kind: 1.0}, "prompt": [*PROMPT, 11, 12, 13, 50]},
        "again": {"adapters": {kind: 1.0}, "prompt": [80, *PROMPT, 11, 12, 13]},
    }
    compare(checkpoint, requests, paths)
