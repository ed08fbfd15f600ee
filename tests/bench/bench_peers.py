"""This engine beside transformers + PEFT on one machine: 16 requests at once, each under its own adapter.

Run it with ``make bench-peers``. The engine's log-probabilities are checked against PEFT's first; if they differ, no
speed is printed. The last line of standard output is the record as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_model import LAYERS, LINEARS, RANK, VOCABULARY, make_adapters, make_checkpoint, make_prompts
from machine import describe, matmul_rate, read_bandwidth
from peft import PeftModel
from step_profile import profile_decode
from transformers import AutoModelForCausalLM

from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.engine_inline import InlineEngine
from loraplex.server.messages import AdapterRef, Generate, SamplingParams

BASE_PARAMETERS = LAYERS * sum(width * out for width, out in LINEARS.values()) + VOCABULARY * 896
ADAPTER_PARAMETERS = LAYERS * sum(RANK * (width + out) for width, out in LINEARS.values())
AIMS = {"peft_mixed": 4.0, "peft_switching": 12.0, "adapter_cost": 0.60, "distinct_loss": 0.40}


def engine_config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), pool_bytes=4 << 30, host_adapter_bytes=4 << 30)


async def run_requests(
    engine: InlineEngine, prompts: Sequence[list[int]], adapters: Sequence[AdapterRef | None], num_out: int
) -> dict[str, float]:
    """Send all requests at once; output tokens per second, and times to the first token."""
    first: list[float] = []
    started = time.perf_counter()

    async def one(index: int) -> None:
        params = SamplingParams(max_tokens=num_out, temperature=0.0, ignore_eos=True)
        seen = False
        command = Generate(
            request_id=f"{started}-{index}", prompt_ids=prompts[index], params=params, adapter=adapters[index]
        )
        async for output in engine.generate(command):
            if output.token_ids and not seen:
                seen = True
                first.append(time.perf_counter() - started)

    await asyncio.gather(*(one(index) for index in range(len(prompts))))
    took = time.perf_counter() - started
    decode = took - max(first)
    return {
        "tokens_per_s": len(prompts) * num_out / took,
        "decode_tokens_per_s": len(prompts) * (num_out - 1) / decode,
        "ttft_median_s": median(first),
        "seconds": took,
    }


async def bench_engine(folder: Path, refs: list[AdapterRef], args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of every scenario, the median of each."""
    engine = InlineEngine(engine_config(folder))
    await engine.start()
    prompts = make_prompts(32, args.prompt)
    scenarios: dict[str, tuple[int, list[AdapterRef | None]]] = {
        "base_only_16": (16, [None] * 16),
        "distinct_16": (16, list(refs[:16])),
        "one_adapter_32": (32, [refs[0]] * 32),
        "distinct_32": (32, list(refs[:32])),
    }
    await run_requests(engine, prompts, list(refs[:32]), 2)  # pages every adapter in
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in scenarios}
    for _ in range(args.rounds):
        for name, (count, adapters) in scenarios.items():
            rounds[name].append(await run_requests(engine, prompts[:count], adapters, args.out))
            show(f"engine {name}", rounds[name][-1])
    info = engine.info
    await engine.close()
    found: dict[str, Any] = {
        name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in rounds.items()
    }
    found["dtype"] = info.dtype
    return found


@contextlib.contextmanager
def peft_model(folder: Path, adapters: Sequence[Path], dtype: torch.dtype) -> Iterator[Any]:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter), adapter_name=adapter.name)
    model = model.to(dtype).eval()
    with torch.inference_mode():
        yield model
    del model, base
    gc.collect()


def bench_peft(folder: Path, adapters: Sequence[Path], dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """PEFT with one adapter name per row of a batch, and with one request after another."""
    prompts = torch.tensor(make_prompts(16, args.prompt))
    names = [adapter.name for adapter in adapters[:16]]
    settings = {
        "do_sample": False,
        "max_new_tokens": args.out,
        "min_new_tokens": args.out,
        "pad_token_id": 0,
    }
    found: dict[str, Any] = {}
    with peft_model(folder, adapters[:16], dtype) as model:
        started = time.perf_counter()
        model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), adapter_names=names, **settings)
        found["mixed_tokens_per_s"] = 16 * args.out / (time.perf_counter() - started)
        switching = min(16, args.switching)
        started = time.perf_counter()
        for row, name in zip(prompts[:switching], names):
            model.set_adapter(name)
            model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **settings)
        found["switching_tokens_per_s"] = switching * args.out / (time.perf_counter() - started)
    show(f"peft {dtype}", found)
    return found


def check(folder: Path, adapters: Sequence[Path], refs: list[AdapterRef]) -> float:
    """Largest difference of log-probabilities between this engine and PEFT, both in float32."""
    prompts = make_prompts(3, 24)
    config = EngineConfig(model=str(folder), pool_bytes=1 << 30, dtype="float32")
    engine = build_engine(config)
    chosen = [refs[0], refs[5], None]
    for index, (prompt, ref) in enumerate(zip(prompts, chosen)):
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        engine.handle(Generate(request_id=str(index), prompt_ids=prompt, params=params, adapter=ref))
    ours: dict[str, list[float]] = {}
    while engine.has_work:
        for event in engine.step():
            for output in getattr(event, "outputs", []):
                ours[output.request_id] = [entry.logprob for entry in output.prompt_logprobs[1:]]
        time.sleep(0.001)
    engine.close()
    worst = 0.0
    with peft_model(folder, [adapters[0], adapters[5]], torch.float32) as model:
        for index, (prompt, ref) in enumerate(zip(prompts, chosen)):
            ids = torch.tensor([prompt])
            model.set_adapter(adapters[0].name if ref is None else Path(ref.path).name)
            with model.disable_adapter() if ref is None else contextlib.nullcontext():
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            theirs = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
            worst = max(worst, *(abs(a - b) for a, b in zip(ours[str(index)], theirs)))
    return worst


def floors(dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """The least time that the 16 requests could take: products at the measured rate, bytes at the bandwidth."""
    rate, bandwidth = matmul_rate(getattr(torch, dtype)), read_bandwidth()
    size = getattr(torch, dtype).itemsize
    per_token = 2 * (BASE_PARAMETERS + ADAPTER_PARAMETERS)
    prefill = 16 * args.prompt * per_token / rate
    step_bytes = (BASE_PARAMETERS + 16 * ADAPTER_PARAMETERS) * size / bandwidth
    step_flops = 16 * per_token / rate
    decode = (args.out - 1) * max(step_bytes, step_flops)
    return {
        "flops_per_s": rate,
        "bytes_per_s": bandwidth,
        "prefill_s": prefill,
        "decode_step_by_bytes_s": step_bytes,
        "decode_step_by_flops_s": step_flops,
        "tokens_per_s": 16 * args.out / (prefill + decode),
    }


def ratios(engine: dict[str, Any], peft: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the aims are about. PEFT counts at the better of its dtypes."""
    ours = engine["distinct_16"]["tokens_per_s"]
    mixed = max(run["mixed_tokens_per_s"] for run in peft.values())
    switching = max(run["switching_tokens_per_s"] for run in peft.values())
    as_saved = peft["bfloat16"]
    base, one, many = (engine[name]["tokens_per_s"] for name in ("base_only_16", "one_adapter_32", "distinct_32"))
    return {
        "over_peft_mixed_bfloat16": ours / as_saved["mixed_tokens_per_s"],
        "over_peft_switching_bfloat16": ours / as_saved["switching_tokens_per_s"],
        "over_peft_mixed_best_dtype": ours / mixed,
        "over_peft_switching_best_dtype": ours / switching,
        "adapter_cost": base / ours - 1,
        "adapter_cost_decode": engine["base_only_16"]["decode_tokens_per_s"]
        / engine["distinct_16"]["decode_tokens_per_s"]
        - 1,
        "loss_from_1_to_32_distinct": 1 - many / one,
    }


def show(what: str, figures: dict[str, Any]) -> None:
    cells = "  ".join(f"{key}={value:.3f}" for key, value in figures.items() if isinstance(value, float))
    print(f"{what:28s} {cells}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the engine's scenarios")
    parser.add_argument("--switching", type=int, default=4, help="requests of the switching run, 16 at most")
    parser.add_argument("--no-peers", action="store_true", help="the engine alone")
    args = parser.parse_args()
    folder, adapters = make_checkpoint(), make_adapters(32)
    refs = [AdapterRef(name=path.name, path=str(path)) for path in adapters]
    worst = check(folder, adapters, refs)
    print(f"largest difference of log-probabilities to PEFT in float32: {worst:.2e}")
    if not worst < 1e-3:
        print("the engine is wrong: no speed is printed")
        return 1
    engine = asyncio.run(bench_engine(folder, refs, args))
    record: dict[str, Any] = {"machine": describe(), "check": worst, "engine": engine}
    record["floor"] = floors(engine["dtype"], args)
    show("floor", record["floor"])
    record["profile"] = profile_decode(engine_config(folder), refs[:16], make_prompts(16, args.prompt))
    show("decode step, share of time", record["profile"])
    if not args.no_peers:
        dtypes = (torch.bfloat16, torch.float32)
        peft = {str(d).removeprefix("torch."): bench_peft(folder, adapters, d, args) for d in dtypes}
        record |= {"peft": peft, "ratios": ratios(engine, peft), "aims": AIMS}
        show("ratios", record["ratios"])
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
