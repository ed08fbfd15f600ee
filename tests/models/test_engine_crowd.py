"""Many requests over many adapters in a small pool, with clients that go away."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from loraplex.server.messages import Abort, AdapterInfo, AdapterRef, LoadAdapter

Adapters = list[AdapterRef]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


def make_requests(adapters: Adapters, count: int) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """Request id, what to generate, and after how many steps its client goes away."""
    rng = random.Random(1)
    for i in range(count):
        greedy = rng.random() < 0.5
        yield (
            f"r{i}",
            {
                "prompt": prompt_of(rng.choice((1, 9, 14, 29, 30)), i),
                "adapter": None if rng.random() < 0.1 else rng.choice(adapters),
                "n": rng.choice((1, 1, 1, 2)),
                "max_tokens": rng.randrange(1, 20),
                "temperature": 0.0 if greedy else 0.8,
                "seed": i,
                "ignore_eos": False,
            },
            rng.randrange(12) if rng.random() < 0.15 else None,
        )


def loaded(driver: Any, adapter: AdapterRef) -> AdapterInfo:
    """What an adapter takes."""
    driver.handle(LoadAdapter(call_id="load", adapter=adapter))
    driver.run()
    info: AdapterInfo = driver.answers["load"].adapter
    return info


def test_five_hundred_requests_over_a_hundred_adapters_in_a_pool_of_five(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    measure = make_engine(llama)
    pages = 5 * loaded(measure, hundred_adapters[1]).pages
    driver = make_engine(llama, pages=pages, prefill_chunk=16, max_batch_tokens=64)
    leaving: list[tuple[int, str]] = []
    requests = {request_id: kwargs for request_id, kwargs, _ in make_requests(hundred_adapters, 500)}
    arrivals, rng, step = make_requests(hundred_adapters, 500), random.Random(2), 0
    waiting = True
    while waiting or driver.engine.has_work:
        for _ in range(rng.randrange(16)):
            arrival = next(arrivals, None)
            waiting = arrival is not None
            if arrival is not None:
                driver.generate(arrival[0], **arrival[1])
                leaving += [(step + arrival[2], arrival[0])] if arrival[2] is not None else []
        for request_id in [name for at, name in leaving if at <= step]:
            driver.handle(Abort(request_id=request_id))
            driver.aborted.add(request_id)
        leaving = [(at, name) for at, name in leaving if at > step]
        driver.step()
        if step % 50 == 0:
            driver.engine.check_integrity()
        if not driver.engine.is_runnable:
            time.sleep(0.001)
        step += 1
    driver.run()

    assert not driver.failed
    finished = []
    for request_id, kwargs in requests.items():
        reasons = [driver.choices[request_id, index].finish_reason for index in range(kwargs["n"])]
        if all(reasons):
            finished.append(request_id)
        else:
            assert request_id in driver.aborted
    assert len(finished) > 400
    stats = driver.engine.stats()
    assert stats.adapter_evictions > 100
    assert stats.preemptions > 0
    driver.check_idle()

    for request_id in rng.sample(finished, 25):
        kwargs = requests[request_id]
        measure.generate(request_id, **kwargs)
        measure.run()
        for index in range(kwargs["n"]):
            assert driver.tokens(request_id, index) == measure.tokens(request_id, index), request_id


def test_a_host_store_for_ten_of_a_hundred_adapters_reads_each_of_them_once(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    info = loaded(make_engine(llama), hundred_adapters[1])
    driver = make_engine(llama, pages=4 * info.pages, host_adapter_bytes=10 * info.bytes, prefetch=False)
    for at, adapter in enumerate(hundred_adapters):
        driver.generate(f"r{at}", prompt=prompt_of(9, at), adapter=adapter, max_tokens=3, ignore_eos=True)
    driver.run()
    assert not driver.failed
    stats = driver.engine.stats()
    counts = {(count.tier, count.what): count.count for count in stats.lookups}
    gone = {(count.tier, count.what): count.count for count in stats.evictions}
    assert counts["host", "miss"] == 100, "none is there before somebody asks for it"
    assert 80 <= gone["host", "room"] <= 100, "none is put out for others before it was used"
    driver.check_idle()
