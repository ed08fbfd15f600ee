"""2,000 adapters against 5 over S-LoRA's synthetic trace, through scheduler and runner.

S-LoRA (https://arxiv.org/abs/2311.03285, section 7): requests choose adapters by a power law of exponent 1, prompts and
outputs are uniform in [8, 512] tokens, adapters are of rank 8 on q, k, v and o. Two things differ. Every adapter is
asked for at least once (there, 907 of 2,000 were), the rest of the requests follow the power law. And all requests
arrive at once instead of by a Gamma process, so that what is compared is the throughput of a saturated engine. The
images of all adapters share the memory of a few on the host; in the pool each has pages of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import random_adapters
from context import Context
from costs import ATTENTION_SITES
from engine_runs import Tally, TraceRequest, run_trace
from harness import Harness
from record import Record

from loraplex.server.messages import AdapterRef

RANK = 8
EXPONENT = 1.0
IMAGES = 8
AIM = 0.97


def run(context: Context) -> list[Record]:
    """Tokens a second under all adapters over those under a few; the same requests otherwise."""
    harness, scale = context.harness, context.scale
    spec = random_adapters.lora(context.shape, RANK, ATTENTION_SITES)
    refs: list[AdapterRef] = []
    for seed in range(IMAGES):
        image = replace(harness.image(spec, seed), identity=f"crowd-{seed}")
        refs += harness.register(image, -(-scale.crowd // IMAGES))
    refs = refs[: scale.crowd]
    trace = make_trace(scale.crowd, scale.crowd_requests, scale.crowd_lengths)
    limit = min(scale.crowd_limit, context.seconds_left / 2)
    _warm_up(harness, refs, limit)
    few = run_trace(harness, refs[: scale.few], trace, limit)
    harness.put_out(refs)
    many = run_trace(harness, refs, trace, limit)
    stats = harness.engine.stats()
    harness.put_out(refs)
    return [
        Record(
            name=f"{len(refs)} adapters against {scale.few}, tokens a second, {len(many.adapters)} touched",
            measured=_rate(many) / _rate(few),
            unit="x",
            floor=1.0,
            aim=AIM,
            higher_is_better=True,
            details={
                "tokens_per_s": _rate(many),
                "tokens_per_s_few": _rate(few),
                "requests_per_s": many.requests / many.seconds,
                "requests": len(trace),
                "all_touched": len(many.adapters) == len(refs),
                "was_cut": few.was_cut or many.was_cut,
                "steps": many.steps,
                "steps_few": few.steps,
                "adapter_loads": stats.adapter_loads,
                "adapter_evictions": stats.adapter_evictions,
                "preemptions": stats.preemptions,
            },
        )
    ]


def _warm_up(harness: Harness, refs: Sequence[AdapterRef], limit: float) -> None:
    """Short requests under every adapter: the tables that adapters are entered in grow to their size, and steps of all
    sizes are captured, before either run."""
    run_trace(harness, refs, [TraceRequest(index, 8, 1 + index % 24) for index in range(len(refs))], limit)
    harness.put_out(refs)


def make_trace(adapters: int, requests: int, lengths: tuple[int, int], seed: int = 0) -> list[TraceRequest]:
    """Each adapter once, the others by the power law, in random order."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, adapters + 1, dtype=np.float64) ** -EXPONENT
    drawn = random.choice(adapters, max(0, requests - adapters), p=weights / weights.sum())
    chosen = random.permutation(np.concatenate([np.arange(adapters), drawn]))
    prompts, outputs = random.integers(lengths[0], lengths[1], (2, len(chosen)), endpoint=True)
    return [TraceRequest(*row) for row in zip(chosen.tolist(), prompts.tolist(), outputs.tolist())]


def _rate(tally: Tally) -> float:
    return tally.tokens / tally.seconds
