"""The engine in a thread, as clients in an event loop see it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.engine_config import EngineConfig
from loraplex.server.engine_inline import InlineEngine
from loraplex.server.errors import AdapterInvalidError, UnavailableError
from loraplex.server.messages import AdapterRef, Generate, SamplingParams

Adapters = list[AdapterRef]
PROMPT = [7, 8, 9, 10, 11]


def command(request_id: str, adapter: AdapterRef | None = None, **params: Any) -> Generate:
    sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **params})
    return Generate(request_id=request_id, prompt_ids=PROMPT, params=sampling, adapter=adapter)


async def collect(engine: InlineEngine, generate: Generate) -> list[int]:
    return [token async for output in engine.generate(generate) for token in output.token_ids]


def inline_config(checkpoint: Any, **settings: Any) -> EngineConfig:
    bytes_ = 40 * checkpoint.page_bytes()
    return EngineConfig(
        model=str(checkpoint.folder),
        pool_bytes=bytes_,
        poison_freed_pages=True,
        threads=1,
        stats_interval=0.01,
        **settings,
    )


async def test_the_inline_engine_serves_many_at_once(llama: Any, make_engine: Any, hundred_adapters: Adapters) -> None:
    refs = [None, *hundred_adapters[:9]]
    driver = make_engine(llama)
    for i, ref in enumerate(refs):
        driver.generate(str(i), PROMPT, ref)
    driver.run()
    engine = InlineEngine(inline_config(llama))
    await engine.start()
    try:
        assert engine.state == "ready"
        found = await asyncio.gather(*(collect(engine, command(str(i), ref)) for i, ref in enumerate(refs)))
        assert found == [driver.tokens(str(i)) for i in range(len(refs))]
        info = await engine.load_adapter(hundred_adapters[20])
        assert engine.adapters.state(hundred_adapters[20]).info == info
        assert len(engine.adapters) == 10
        await engine.unload_adapter(hundred_adapters[20])
        assert len(engine.adapters) == 9
        with pytest.raises(AdapterInvalidError):
            await engine.load_adapter(AdapterRef(name="x", path="/nowhere"))
        with pytest.raises(AdapterInvalidError):
            await collect(engine, command("bad", AdapterRef(name="x", path="/nowhere")))
    finally:
        await engine.close()
    assert engine.state == "stopped"
    assert engine.engine is not None
    engine.engine.check_integrity()


async def test_a_client_that_goes_away_frees_its_pages(llama: Any, hundred_adapters: Adapters) -> None:
    engine = InlineEngine(inline_config(llama))
    await engine.start()
    try:
        stream = engine.generate(command("gone", hundred_adapters[0], max_tokens=200))
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        idle = asyncio.Event()
        engine.on_stats.append(lambda stats: None if stats.running or stats.pages_kv else idle.set())
        assert len(await collect(engine, command("next", hundred_adapters[0]))) == 8
        await asyncio.wait_for(idle.wait(), 10)
        assert engine.stats.steps < 100
    finally:
        await engine.close()


async def test_closing_the_engine_ends_what_is_open(llama: Any) -> None:
    engine = InlineEngine(inline_config(llama))
    await engine.start()
    task = asyncio.create_task(collect(engine, command("open", max_tokens=250)))
    await asyncio.sleep(0.02)
    await engine.close()
    with pytest.raises(UnavailableError):
        await task


async def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    engine = InlineEngine(EngineConfig(model=str(tmp_path)))
    with pytest.raises(Exception, match=r"config\.json"):
        await engine.start()
    assert engine.state == "failed"
    await engine.close()
