"""The engine with a runner whose results come one step late, as a device's do."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from loraplex.server.messages import Abort, AdapterRef, LoadAdapter
from loraplex.server.step_plan import Chunk, StepResult

Adapters = list[AdapterRef]
ON_THE_CPU = {"device": "cpu", "kernels": "plain"}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


@dataclass
class Late:
    found: StepResult | None

    def result(self) -> StepResult:
        if self.found is None:
            raise RuntimeError("a fault of the device")
        return self.found


class LateRunner:
    """Computes at once, with the tokens that only a device would know, and tells of it later.

    Args:
        runner: that computes.
        fails: launches, counted from 0, that raise, by what does: "launch" or "result".
    """

    runs_ahead = True

    def __init__(self, runner: Any, fails: dict[int, str] | None = None) -> None:
        self.runner = runner
        self.fails = fails or {}
        self.num_launched = self.num_awaited = 0
        self.sampled: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch(self, chunks: list[Chunk]) -> Late:
        fault = self.fails.get(self.num_launched)
        self.num_launched += 1
        if fault == "launch":
            raise RuntimeError("a fault of the device")
        waiting = [chunk.sequence for chunk in chunks if chunk.awaits_token]
        self.num_awaited += len(waiting)
        for sequence in waiting:
            sequence.output_ids.append(self.sampled[sequence.seq_id])
            sequence.num_pending = 0
        found = self.runner.run(chunks)
        for sequence in waiting:
            sequence.output_ids.pop()
            sequence.num_pending = 1
        self.sampled.update({seq_id: token.token_id for seq_id, token in found.sampled.items()})
        return Late(None if fault == "result" else found)


def run_ahead(driver: Any, fails: dict[int, str] | None = None) -> LateRunner:
    engine = driver.engine
    runner = LateRunner(engine._parts.runner, fails)
    engine._parts = replace(engine._parts, runner=runner)
    return runner


def test_answers_are_those_of_an_engine_that_waits_for_each_step(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    drivers = [make_engine(llama, pages=40, prefill_chunk=16, max_batch_tokens=48, **ON_THE_CPU) for _ in range(2)]
    runner = run_ahead(drivers[1])
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3, "logprobs": 2},
        {"temperature": 1.0, "seed": 4, "top_p": 0.9, "n": 2, "ignore_eos": False},
        {"min_tokens": 4, "stop_token_ids": tuple(range(0, 300, 4))},
        {"prompt_logprobs": 1, "logit_bias": {17: 2.0}},
    ]
    penalized = {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.5}
    for driver in drivers:
        for i in range(20):
            adapter = hundred_adapters[i % 3] if i % 4 else None
            kind = penalized if i == 7 else kinds[i % len(kinds)]
            driver.generate(f"r{i}", prompt_of(5 + 3 * i, i), adapter, max_tokens=1 + i % 13, **kind)
            driver.step()
            driver.engine.check_integrity()
        driver.run()
        driver.check_idle()
    assert not drivers[0].failed
    assert not drivers[1].failed
    assert runner.num_awaited > 50
    assert drivers[0].choices.keys() == drivers[1].choices.keys()
    for key, expected in drivers[0].choices.items():
        found = drivers[1].choices[key]
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
        # A CPU's products depend on the number of rows in their last bits.
        for ours, theirs in zip(
            [*found.logprobs, *(found.prompt_logprobs or ())],
            [*expected.logprobs, *(expected.prompt_logprobs or ())],
            strict=True,
        ):
            if ours is None or theirs is None:
                assert ours is theirs
            else:
                assert ours.token_id == theirs.token_id
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("fault", ["launch", "result"])
@pytest.mark.parametrize("at_launch", [0, 1, 4])
def test_a_fault_ends_every_request_once_and_the_engine_goes_on(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, fault: str, at_launch: int
) -> None:
    alone, driver = make_engine(llama, **ON_THE_CPU), make_engine(llama, **ON_THE_CPU)
    alone.generate("again", prompt_of(9), hundred_adapters[0])
    alone.run()
    driver.handle(LoadAdapter(call_id="load", adapter=hundred_adapters[0]))
    driver.run()
    run_ahead(driver, {at_launch: fault})
    driver.generate("adapted", prompt_of(9), hundred_adapters[0], n=2, max_tokens=30)
    driver.generate("base", prompt_of(5), max_tokens=30)
    driver.run()
    assert driver.failed.keys() == {"adapted", "base"}
    driver.generate("again", prompt_of(9), hundred_adapters[0])
    driver.run()
    assert driver.tokens("again") == alone.tokens("again")
    driver.check_idle()


def test_the_loop_comes_back_for_a_step_whose_requests_are_gone(llama: Any, make_engine: Any) -> None:
    driver = make_engine(llama, **ON_THE_CPU)
    run_ahead(driver)
    driver.generate("gone", prompt_of(5), max_tokens=30)
    driver.step()
    driver.handle(Abort(request_id="gone"))
    driver.aborted.add("gone")
    assert driver.engine.is_runnable
    assert driver.engine.has_work
    driver.run()
    assert not driver.engine.is_runnable
    driver.check_idle()


def test_what_a_completed_step_said_is_told_though_the_next_one_fails(llama: Any, make_engine: Any) -> None:
    driver = make_engine(llama, **ON_THE_CPU)
    run_ahead(driver, {2: "launch"})
    driver.generate("ends", prompt_of(5), max_tokens=2, presence_penalty=0.5)
    driver.generate("fails", prompt_of(5), max_tokens=9)
    driver.run()
    assert len(driver.tokens("ends")) == 2
    assert driver.failed.keys() == {"fails"}
    driver.check_idle()
