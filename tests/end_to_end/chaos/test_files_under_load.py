"""Files of adapters are deleted, cut off, exchanged, spoilt and slow while the server is busy with others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

WHOLE = ("upper-00", "reverse-00", "spell-00", "caesar-01", None)
"""What is asked for in the background, and must never fail."""

SOON = 8.0
"""Seconds within which an adapter that nothing ails is read and answers, on such a machine."""

QUICKLY = 20.0
"""Seconds within which a request hears that its adapter is broken, on a machine that has other things to do."""


@contextmanager
def unharmed(load: Any, server: Any) -> Iterator[Any]:
    """A background load that meets no error at all, on a server that stays healthy."""
    with load.Load(server, WHOLE, clients=3) as running, load.HealthWatch(server) as health:
        running.wait_for_answers(2)
        yield running
        running.wait_for_answers(5)
    assert not running.failures, running.failures[:3]
    assert health.statuses == [200]


def ask(load: Any, server: Any, adapter: str, *, stream: bool = False) -> Any:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        return load.ask(client, adapter, "kernel", stream=stream)


@contextmanager
def in_use(server: Any, adapter: str) -> Iterator[None]:
    """A request that has begun to be answered and takes much longer than any other, so that its adapter stays."""
    body = {"messages": [{"role": "user", "content": "kernel"}], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (
        httpx2.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json={**body, "adapter_id": adapter}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        events = (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line)
        assert any(event["choices"][0]["delta"].get("content") for event in events)
        yield


def put_out(load: Any, server: Any, adapters: Any, but: str) -> None:
    """Ask for other adapters until this one is neither in the pool nor on the host."""
    for other in [name for name in adapters.names if name not in WHOLE and name != but] * 3:
        if server.get(f"/v1/adapters/{but}").json()["tier"] == "disk":
            return
        ask(load, server, other)
    raise AssertionError(f"{but} does not go")


def check_refused(load: Any, server: Any, name: str, *words: str) -> Any:
    """Streaming or not, it is an error in time that names the adapter and what is wrong with it."""
    for stream in (False, True):
        one = ask(load, server, name, stream=stream)
        assert one.failure is not None, f"{name} was answered: {one.text}"
        assert one.seconds < QUICKLY
        assert f"'{name}'" in one.failure.message
        assert any(word in one.failure.message for word in words), one.failure.message
    return one.failure


def comes_back(load: Any, server: Any, name: str) -> bool:
    """One try, for ``wait_until``."""
    one = ask(load, server, name)
    assert one.text is None or one.is_right
    return one.text is not None


FAULTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("delete", "echo-01", ("no such folder",)),
    ("truncate", "reverse-01", ("adapter_model.safetensors", "changed")),
    ("spoil_config", "spell-01", ("adapter_config.json",)),
    ("become_pipe", "devowel-01", ("regular file",)),
    ("become_broken_link", "upper-01", ("adapter_model.safetensors",)),
]


def test_broken_files_are_errors_of_their_adapters_alone_until_they_are_mended(
    load: Any, chaos: Any, adapters: Any, wait_until: Callable[..., bool]
) -> None:
    broken = [name for _, name, _ in FAULTS]
    for name in broken:
        put_out(load, chaos, adapters, name)
    with unharmed(load, chaos):
        for fault, name, _ in FAULTS:
            getattr(adapters, fault)(name)
        for _, name, words in FAULTS:
            failure = check_refused(load, chaos, name, *words)
            assert failure.code == "adapter_invalid"
            assert wait_until(lambda name=name: chaos.get(f"/v1/adapters/{name}").json()["state"] == "failed"), name
        adapters.mend(*broken)
        for name in broken:
            assert wait_until(lambda name=name: comes_back(load, chaos, name), 60), name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error_of_its_adapter(load: Any, chaos: Any, adapters: Any) -> None:
    adapters.close_off("echo-02")
    check_refused(load, chaos, "echo-02", "Permission denied")
    adapters.mend("echo-02")


def test_exchanged_files_are_never_served_under_the_old_name_until_they_are_loaded_again(
    load: Any, chaos: Any, adapters: Any, wait_until: Callable[..., bool]
) -> None:
    one, other = "reverse-02", "caesar-02"
    with unharmed(load, chaos):
        assert ask(load, chaos, one).is_right
        with in_use(chaos, other):
            adapters.swap(one, other)
            # What was read before goes on being served; what is read again is not what was registered.
            assert ask(load, chaos, other).is_right
        for name in (one, other):
            put_out(load, chaos, adapters, name)
            failure = check_refused(load, chaos, name, "changed")
            assert failure.code == "adapter_invalid"
        loaded = chaos.post(
            "/v1/load_lora_adapter",
            {"lora_name": one, "lora_path": str(adapters.path(one)), "load_inplace": True},
        )
        assert loaded.status_code == 200, loaded.text
        assert ask(load, chaos, one).text == load.right_answer("caesar", "kernel")
        # What the other name was registered for may be in the pool again, read from a place that is not its own.
        again = ask(load, chaos, other)
        assert again.is_right if again.failure is None else "changed" in again.failure.message
        adapters.mend(one, other)
        loaded = chaos.post(
            "/v1/load_lora_adapter",
            {"lora_name": one, "lora_path": str(adapters.path(one)), "load_inplace": True},
        )
        assert loaded.status_code == 200, loaded.text
        assert wait_until(lambda: comes_back(load, chaos, other), 60)
        assert ask(load, chaos, one).is_right


def test_files_that_change_all_the_time_yield_right_answers_or_errors(load: Any, chaos: Any, adapters: Any) -> None:
    names = [f"{task}-03" for task in ("upper", "reverse", "spell", "devowel", "echo", "caesar")]
    adapters.keep(*names)
    for name in names:  # from its first read on an adapter stands for its content
        assert ask(load, chaos, name).is_right
    with unharmed(load, chaos), load.Load(chaos, names, clients=3) as running:
        deadline = time.monotonic() + 4
        turn = 0
        while time.monotonic() < deadline:
            name, following = names[turn % 6], names[(turn + 1) % 6]
            [adapters.truncate, adapters.delete, lambda name, to=following: adapters.swap(name, to)][turn % 3](name)
            time.sleep(0.05)
            adapters.mend(name, following)
            turn += 1
        running.wait_for_answers(1)
    assert all(f"'{one.adapter}'" in one.failure.message for one in running.failures)
    # What changes while it is being read may be whole at the next try.
    assert {one.failure.code for one in running.failures} <= {"adapter_invalid", "adapter_unavailable"}


def test_a_slow_file_system_keeps_nobody_waiting_but_who_asks_for_it(
    load: Any, chaos: Any, adapters: Any, folders: Any, slowness: Any, tmp_path: Path
) -> None:
    """As many adapters are slow as there are loader threads: neither what is warm nor what is cold waits for them."""
    warm, cold = ("upper-00", "spell-00", None), "devowel-04"
    slow = {f"{task}-slow": folders.copy_adapter(task, tmp_path / f"slow-{task}", 50) for task in ("echo", "reverse")}
    for name, folder in slow.items():
        registered = chaos.post("/v1/adapters", {"id": name, "path": str(folder), "tags": ["slow"]})
        assert registered.status_code == 200, registered.text
    put_out(load, chaos, adapters, cold)

    def revive(name: str) -> Any:
        body = {"lora_name": name, "lora_path": str(slow[name]), "load_inplace": True}
        return chaos.post("/v1/load_lora_adapter", body)

    def pace(running: Any) -> float:
        """The median gap between events while so many requests are answered."""
        began = len(running.ended)
        running.wait_for_answers(10, seconds=120)
        return float(load.median(gap for one in running.ended[began:] for gap in one.gaps))

    with load.Load(chaos, warm, clients=3) as running, load.HealthWatch(chaos) as health, ThreadPoolExecutor(2) as pool:
        before = pace(running)
        slowness.begin(100)
        try:
            waiting = [pool.submit(revive, name) for name in slow]
            during = pace(running)
            fresh = ask(load, chaos, cold)
            assert fresh.is_right
            assert fresh.seconds < SOON
            assert not any(one.done() for one in waiting)
        finally:
            slowness.end()
        assert [one.result(60).status_code for one in waiting] == [200, 200]
        after = pace(running)
    assert not running.failures
    assert health.statuses == [200]
    assert during < 2 * max(before, after)
    for name in slow:
        assert ask(load, chaos, name).is_right
        assert chaos.request("DELETE", f"/v1/adapters/{name}").status_code == 200
