"""Where the time of a decode step goes, by kind of work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from loraplex.server.engine import Engine
from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.messages import AdapterRef, Generate, SamplingParams

_KINDS = {
    "mkldnn::_linear_pointwise": "base_products",
    "loraplex::shrink": "lora_shrink",
    "loraplex::expand": "lora_expand",
    "loraplex::decode_attention": "attention",
    "loraplex::prefill_attention": "attention",
    "loraplex::write_kv": "attention",
}


def profile_decode(
    config: EngineConfig, adapters: Sequence[AdapterRef | None], prompts: Sequence[list[int]], steps: int = 12
) -> dict[str, float]:
    """Shares of the wall time of decode steps, one request for each prompt and adapter.

    ``small_operators`` are the other torch operators (norms, rotary embedding, activation, sampling); ``host`` is what
    is left: scheduling, building tensors, Python between operators.
    """
    engine = build_engine(config)
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters)):
        params = SamplingParams(max_tokens=steps + 40, temperature=0.0, ignore_eos=True)
        engine.handle(Generate(request_id=str(index), prompt_ids=list(prompt), params=params, adapter=adapter))
    _until_decoding(engine, len(prompts))
    for _ in range(3):
        engine.step()
    plain = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wall = (time.perf_counter() - plain) / steps
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            engine.step()
    engine.close()
    spent: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            spent[_KINDS.get(event.name, "small_operators")] += event.cpu_time_total
    shares = {kind: time_us / 1e6 / steps / wall for kind, time_us in spent.items()}
    return {"step_ms": wall * 1e3} | shares | {"host": 1 - sum(shares.values())}


def _until_decoding(engine: Engine, count: int) -> None:
    """Step until every request has had its first token."""
    started: set[str] = set()
    while len(started) < count:
        for event in engine.step():
            started |= {output.request_id for output in getattr(event, "outputs", [])}
