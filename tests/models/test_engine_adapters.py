"""Adapters in the engine: read, shared, replaced, broken, too large, and more of them than there is room for."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.errors import AdapterInvalidError
from loraplex.server.messages import (
    AdapterRef,
    CallDone,
    CallFailed,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    RestoredAdapter,
    UnloadAdapter,
)

Adapters = list[AdapterRef]
PROMPT = [7, 8, 9, 10, 11]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


def test_calls_load_and_unload_and_clients_hear_where_the_adapter_is(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver, ref = make_engine(llama), hundred_adapters[1]
    driver.handle(LoadAdapter(call_id="load", adapter=ref))
    driver.run()
    loaded = driver.answers["load"].adapter
    assert (loaded.rank, loaded.targets) == (4, ["q_proj", "v_proj", "down_proj"])
    assert driver.state(ref).tier == "host"
    driver.generate("r", PROMPT, ref)
    driver.run()
    assert (driver.state(ref).tier, driver.state(ref).info) == ("pool", loaded)
    driver.handle(UnloadAdapter(call_id="unload", adapter=ref))
    driver.step()
    assert isinstance(driver.answers["unload"], CallDone)
    assert driver.engine.stats().pages_free == driver.engine.stats().pages_total
    driver.check_idle()


def test_a_prefetched_adapter_is_in_the_pool_when_the_call_is_answered(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver, ref = make_engine(llama), hundred_adapters[1]
    driver.handle(PrefetchAdapter(call_id="host", adapter=ref, tier="host"))
    driver.run()
    assert driver.state(ref).tier == "host"
    driver.handle(PrefetchAdapter(call_id="pool", adapter=ref))
    driver.run()
    assert driver.state(ref).tier == "pool"
    driver.generate("r", PROMPT, ref)
    driver.run()
    assert driver.engine.stats().adapter_loads == driver.engine.stats().adapter_prefetches == 1
    driver.check_idle()


def test_pinned_adapters_stay_within_their_bound_until_they_are_unpinned(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver, (first, *others) = make_engine(llama, pages=40, max_pinned_fraction=0.3), hundred_adapters[:30]
    driver.handle(PinAdapter(call_id="pin", adapter=first))
    driver.run()
    assert driver.state(first).pinned
    assert driver.state(first).tier == "pool"
    for ref in others:
        driver.handle(PinAdapter(call_id=ref.name, adapter=ref))
    driver.run()
    refused = [driver.answers[ref.name] for ref in others if isinstance(driver.answers[ref.name], CallFailed)]
    assert {answer.error.code for answer in refused} == {"conflict"}
    assert "max_pinned_fraction" in refused[0].error.message
    assert 0 < driver.engine.stats().pages_pinned <= 12
    for i, ref in enumerate(others):
        driver.generate(f"r{i}", prompt_of(50, i), ref)
    driver.run()
    assert driver.engine.stats().adapter_evictions > 0
    assert driver.state(first).tier == "pool", "it was never put out"
    for ref in (first, *others):
        driver.handle(PinAdapter(call_id=f"unpin {ref.name}", adapter=ref, pinned=False))
    driver.run()
    assert driver.engine.stats().pages_pinned == 0
    assert not driver.state(first).pinned
    driver.check_idle()


def test_an_adapter_in_the_pool_is_not_read_again_though_the_host_has_it_no_more(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, tmp_path: Path
) -> None:
    driver = make_engine(llama)
    driver.handle(LoadAdapter(call_id="size", adapter=hundred_adapters[2]))
    driver.run()
    num_bytes = max(driver.answers["size"].adapter.bytes, 1)
    driver = make_engine(llama, host_adapter_bytes=3 * num_bytes)
    folder = shutil.copytree(hundred_adapters[2].path, tmp_path / "mine")
    ref = AdapterRef(name="mine", path=str(folder))
    driver.generate("first", PROMPT, ref)
    driver.run()
    for i in range(20, 32):
        driver.generate(f"other{i}", PROMPT, hundred_adapters[i])
    driver.run()
    shutil.rmtree(folder)
    driver.generate("second", PROMPT, ref)
    driver.run()
    assert driver.tokens("second") == driver.tokens("first")


def test_files_that_have_changed_are_not_served_under_the_old_registration(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, tmp_path: Path
) -> None:
    driver, folder = make_engine(llama, pages=12), shutil.copytree(hundred_adapters[5].path, tmp_path / "name")
    ref = AdapterRef(name="name", path=str(folder))
    driver.handle(
        RestoreAdapters(adapters=[RestoredAdapter(adapter=ref, identity="0" * 64), RestoredAdapter(adapter=ref)])
    )
    driver.generate("r", PROMPT, ref)
    driver.run()
    assert driver.failed["r"].code == "adapter_invalid"
    assert "changed" in driver.failed["r"].message
    assert driver.state(ref).error is not None
    driver.generate("new", PROMPT, AdapterRef(name="name", path=str(folder), revision=1))
    driver.run()
    assert driver.tokens("new")
    driver.check_idle()


def test_a_load_that_fails_is_answered_and_forgotten(llama: Any, make_engine: Any, tmp_path: Path) -> None:
    driver = make_engine(llama)
    driver.handle(LoadAdapter(call_id="load", adapter=AdapterRef(name="x", path=str(tmp_path / "nowhere"))))
    driver.handle(LoadAdapter(call_id="again", adapter=AdapterRef(name="x", path=str(tmp_path / "nowhere"))))
    driver.run()
    for call in ("load", "again"):
        assert isinstance(driver.answers[call], CallFailed)
        assert isinstance(driver.answers[call].error.to_error(), AdapterInvalidError)
    driver.check_idle()


def test_an_adapter_unloaded_while_it_runs_serves_to_the_end(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver, ref = make_engine(llama, pages=22), hundred_adapters[3]
    driver.generate("alone", PROMPT, ref, max_tokens=60)
    driver.run()
    for i in range(8):
        driver.generate(f"r{i}", PROMPT, ref, max_tokens=60)
        driver.generate(f"other{i}", PROMPT, hundred_adapters[4 + i], max_tokens=60)
    driver.step_until(lambda: len(driver.choices["r0", 0].tokens) > 3)
    driver.handle(UnloadAdapter(call_id="unload", adapter=ref))
    driver.run()
    assert not driver.failed
    assert driver.engine.stats().preemptions > 0
    assert all(driver.tokens(f"r{i}") == driver.tokens("alone") for i in range(8))
    driver.check_idle()


def test_two_names_of_one_content_share_its_pages(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, tmp_path: Path
) -> None:
    ref, driver = hundred_adapters[5], make_engine(llama)
    twin = AdapterRef(name="twin", path=str(shutil.copytree(ref.path, tmp_path / "twin")))
    for name, adapter in (("one", ref), ("two", twin)):
        driver.generate(name, PROMPT, adapter, max_tokens=30)
    driver.step_until(lambda: len(driver.choices["one", 0].tokens) > 2 < len(driver.choices["two", 0].tokens))
    assert driver.engine.stats().adapters_resident == 1
    driver.handle(UnloadAdapter(call_id="unload", adapter=ref))
    driver.run()
    assert driver.tokens("one") == driver.tokens("two")
    assert driver.engine.stats().adapters_resident == 1
    driver.check_idle()


def test_a_name_loaded_again_with_other_content_serves_the_new_one(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, tmp_path: Path
) -> None:
    driver, folder = make_engine(llama), shutil.copytree(hundred_adapters[5].path, tmp_path / "name")
    for request_id, i in (("old", 5), ("new", 7)):
        driver.generate(f"expected-{request_id}", PROMPT, hundred_adapters[i], max_tokens=30)
    driver.run()
    old = AdapterRef(name="name", path=str(folder), revision=1)
    driver.generate("old", PROMPT, old, max_tokens=30)
    driver.step_until(lambda: len(driver.choices["old", 0].tokens) > 2)
    driver.handle(UnloadAdapter(call_id="unload", adapter=old))
    shutil.copytree(hundred_adapters[7].path, folder, dirs_exist_ok=True)
    driver.generate("new", PROMPT, AdapterRef(name="name", path=str(folder), revision=2), max_tokens=30)
    driver.run()
    for request_id in ("old", "new"):
        assert driver.tokens(request_id) == driver.tokens(f"expected-{request_id}")
    driver.check_idle()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves_what_float32_does_within_its_rounding(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, dtype: str
) -> None:
    drivers = [make_engine(llama), make_engine(llama, dtype=dtype)]
    for driver in drivers:
        for i in range(6):
            driver.generate(f"r{i}", prompt_of(30, i), hundred_adapters[i], prompt_logprobs=0)
        driver.run()
    exact, rounded = (
        torch.tensor([e.logprob for i in range(6) for e in driver.choices[f"r{i}", 0].prompt_logprobs[1:]])
        for driver in drivers
    )
    error = (rounded - exact).square().mean().sqrt()
    assert 0 < error < (0.06 if dtype == "bfloat16" else 0.008)


def test_a_broken_adapter_fails_its_own_requests_only(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, tmp_path: Path
) -> None:
    folder = shutil.copytree(hundred_adapters[0].path, tmp_path / "broken")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    broken, driver = AdapterRef(name="broken", path=str(folder)), make_engine(llama)
    for i in range(4):
        driver.generate(f"bad{i}", PROMPT, broken, n=1 + i % 2)
        driver.generate(f"good{i}", PROMPT, hundred_adapters[i])
        driver.generate(f"base{i}", PROMPT)
    driver.run()
    assert set(driver.failed) == {f"bad{i}" for i in range(4)}
    assert all(error.to_error().code == "adapter_invalid" for error in driver.failed.values())
    assert all(driver.choices[f"{kind}{i}", 0].finish_reason for kind in ("good", "base") for i in range(4))
    driver.check_idle()


def test_more_adapters_than_the_host_store_holds_are_served_in_turn(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    measure = make_engine(llama)
    for ref in hundred_adapters[:2]:
        measure.handle(LoadAdapter(call_id=ref.name, adapter=ref))
    measure.run()
    largest = max(answer.adapter.bytes for answer in measure.answers.values())
    driver = make_engine(llama, host_adapter_bytes=2 * largest)
    for i in range(12):
        driver.generate(f"r{i}", PROMPT, hundred_adapters[i])
    driver.run()
    assert not driver.failed
    assert all(len(driver.tokens(f"r{i}")) == 8 for i in range(12))
    assert driver.engine.stats().host_bytes <= 2 * largest
    driver.check_idle()


def test_an_adapter_larger_than_the_host_store_is_refused_with_the_numbers(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver = make_engine(llama, host_adapter_bytes=20_000)
    driver.generate("r", PROMPT, hundred_adapters[1])
    driver.run()
    error = driver.failed["r"].to_error()
    assert error.code == "adapter_too_large"
    assert "20000" in error.message
    driver.check_idle()


def test_an_adapter_larger_than_the_pool_is_refused_with_the_numbers(
    llama: Any, make_engine: Any, save_peft: Any, tmp_path: Path
) -> None:
    ref = AdapterRef(name="big", path=str(save_peft(llama, tmp_path / "big", r=32, target_modules="all-linear")))
    driver = make_engine(llama, pages=10)
    driver.generate("r", PROMPT, ref)
    driver.generate("base", PROMPT)
    driver.handle(LoadAdapter(call_id="load", adapter=ref))
    driver.run()
    for error in (driver.failed["r"].to_error(), driver.answers["load"].error.to_error()):
        assert error.code == "adapter_too_large"
        assert "the pool has 10" in error.message
        assert "'big' needs" in error.message
    assert len(driver.tokens("base")) == 8
    driver.check_idle()
