"""Step times of mixtures beside plain LoRA, the base alone and the published programs' order; prints a record.

Decode steps (batch 1, 16, 64 after 64 tokens of context) and prefill steps (512 tokens in all) of the 0.37 B model,
with 1 and with 16 distinct adapters. Variants take turns, and the figures are medians. First of all the mixture of ours
must equal the plain order's. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_model import LAYERS, LINEARS, VOCABULARY, make_checkpoint, make_prompts
from machine import describe, matmul_rate, read_bandwidth
from mixture_kinds import KINDS
from plain_mixture import PlainMixtureDecoder

from loraplex.kernels.dense_linear import DenseLinear
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.server.batch import BatchMaker
from loraplex.server.decoder import Decoder
from loraplex.server.engine import Engine
from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.messages import Generate, SamplingParams
from loraplex.server.model_runner import ModelRunner
from loraplex.server.request import make_request
from loraplex.server.step_plan import Chunk

CONTEXT = 64
PREFILL = 512
BASE_WEIGHTS = LAYERS * sum(i * o for i, o in LINEARS.values())


@dataclass
class Lane:
    """One variant of a cell: its runner, and its sequences' chunks."""

    runner: ModelRunner
    chunks: list[Chunk]
    plain: PlainMixtureDecoder | None = None
    rows: list[tuple[AdapterSpec, torch.Tensor]] = field(default_factory=list)

    def step(self) -> None:
        """One step, over tokens that were not there the last time: what depends on them must not be kept."""
        for chunk in self.chunks:
            chunk.sequence.prompt_ids[-1] = 3 + (chunk.sequence.prompt_ids[-1] + 97) % (VOCABULARY - 3)
        if self.plain is not None:
            self.plain.assign(self.rows)
        self.runner.run(self.chunks)


class Bench:
    """An engine's parts, with adapters paged in by hand."""

    def __init__(self, pool_bytes: int, threads: int | None = None) -> None:
        config = EngineConfig(
            model=str(make_checkpoint()), dtype="float32", device="cpu", pool_bytes=pool_bytes, threads=threads
        )
        self.engine: Engine = build_engine(config)
        self.parts = self.engine._parts
        self.runner = self.parts.runner
        decoder = self.runner._decoder
        self.plain = PlainMixtureDecoder(decoder._traits, decoder._weights)
        self.specs: dict[str, AdapterSpec] = {}
        self.bytes: dict[str, tuple[float, float]] = {}
        self._next = 0

    def load(self, kind: str, count: int) -> list[str]:
        """Page in so many adapters of a kind; returns their identities."""
        names = []
        for index in range(count):
            spec = KINDS[kind](index)
            names.append(spec.identity)
            if spec.identity in self.specs:
                continue
            arena = self.runner._arena
            image = build_image(spec, LAYERS, arena.shape[2], torch.float32)
            self.runner.page_in(image, self.parts.pool.allocate(image.num_pages, contiguous=True))
            self.bytes[spec.identity] = _sizes(spec)
            # Only the plain order reads a description again, and they are large.
            self.specs[spec.identity] = spec if kind == "mixlora" else replace(spec, pairs=())
        return names

    def lane(self, identities: list[str], batch: int, *, prefill: bool, plain: bool = False) -> Lane:
        """Sequences over the adapters in turn, ready for their step; none for the base."""
        chunks = []
        length = PREFILL // batch if prefill else CONTEXT + 1
        for index, prompt in enumerate(make_prompts(batch, length)):
            request = make_request(
                Generate(request_id="x", prompt_ids=prompt, params=SamplingParams(max_tokens=4, temperature=0.0)),
                first_seq_id=self._next,
                arrival=0.0,
                max_total_tokens=4096,
                eos_token_ids=frozenset(),
            )
            self._next += 1
            sequence = request.sequences[0]
            self.parts.kv.extend(sequence.seq_id, length)
            adapters = ((identities[index % len(identities)], 1.0),) if identities else ()
            start = 0 if prefill else CONTEXT
            chunks.append(Chunk(sequence, start, length, True, adapters, 0, False))
        lane = Lane(self._runner(self.plain if plain else self.runner._decoder), chunks)
        self._fill(lane)
        if plain:
            lane.plain = self.plain
            lane.rows = self._rows(chunks)
        return lane

    def _runner(self, decoder: Decoder) -> ModelRunner:
        """A runner of its own for each lane: it keeps what stays the same from step to step."""
        kept = self.runner._batches
        batches = BatchMaker(kept._planner, kept._kv, kept._embedding_group, torch.device("cpu"))
        runner = ModelRunner(decoder, self.runner._arena, batches)
        runner._resident = self.runner._resident
        return runner

    def _fill(self, lane: Lane) -> None:
        """Give the context K/V that is not NaN."""
        for chunk in lane.chunks:
            for page in self.parts.kv.pages(chunk.sequence.seq_id):
                self.runner._arena[:, page].normal_(0, 0.1)

    def _rows(self, chunks: list[Chunk]) -> list[tuple[AdapterSpec, torch.Tensor]]:
        batch = self.runner._batches.make(chunks, self.runner._resident)
        rows: dict[str, list[int]] = {}
        for row, piece in batch.pieces:
            rows.setdefault(piece.chunk.adapters[0][0], []).extend(range(row, row + piece.stop - piece.start))
        return [(self.specs[identity], torch.tensor(some)) for identity, some in rows.items()]

    def release(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            for chunk in lane.chunks:
                self.parts.kv.release(chunk.sequence.seq_id)


@contextmanager
def counted_products() -> Iterator[dict[str, float]]:
    """Counts the floating-point operations of the layers' base products."""
    count = {"flops": 0.0}
    call = DenseLinear.__call__

    def counting(self: DenseLinear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features != VOCABULARY:
            count["flops"] += 2.0 * x.shape[0] * self.in_features * self.out_features
        return call(self, x)

    DenseLinear.__call__ = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        DenseLinear.__call__ = call  # type: ignore[method-assign]


def measure(lanes: dict[str, Lane], rounds: int) -> dict[str, float]:
    """Median seconds of each lane's step; the lanes take turns. The plain order, which is slow, runs half as often."""
    times: dict[str, list[float]] = {name: [] for name in lanes}
    for turn in range(rounds + 1):
        for name, lane in lanes.items():
            if lane.plain is not None and turn % 2:
                continue
            started = time.perf_counter()
            lane.step()
            times[name].append(time.perf_counter() - started)
    return {name: median(some[1:] or some) for name, some in times.items()}


def check(bench: Bench) -> float:
    """Largest difference of log-probabilities between the engine's mixtures and the plain order's."""
    names = bench.load("mixlora", 3)
    worst = 0.0
    for prefill in (False, True):
        lanes = [bench.lane(names, 4, prefill=prefill, plain=plain) for plain in (False, True)]
        arena = bench.runner._arena
        for ours, theirs in zip(lanes[0].chunks, lanes[1].chunks):
            kv = bench.parts.kv
            for page, other in zip(kv.pages(ours.sequence.seq_id), kv.pages(theirs.sequence.seq_id)):
                arena[:, other] = arena[:, page]
        results = []
        for lane in lanes:
            if lane.plain is not None:
                lane.plain.assign(lane.rows)
            batch = lane.runner._batches.make(lane.chunks, lane.runner._resident)
            with torch.inference_mode():
                results.append(lane.runner._decoder.forward(batch.step, arena).log_softmax(-1))
        worst = max(worst, float((results[0] - results[1]).abs().max()))
        bench.release(lanes)
    if worst > 1e-3:
        raise SystemExit(f"the mixtures differ by {worst}; no times for wrong results")
    return worst


def cell(bench: Bench, batch: int, distinct: int, *, prefill: bool, rounds: int) -> dict[str, Any]:
    """All variants of one batch."""
    distinct = min(batch, distinct)
    names = {kind: bench.load(kind, distinct) for kind in KINDS}
    lanes = {"base": bench.lane([], batch, prefill=prefill)}
    lanes |= {kind: bench.lane(names[kind], batch, prefill=prefill) for kind in KINDS}
    lanes["plain order"] = bench.lane(names["mixlora"], batch, prefill=prefill, plain=True)
    flops = {}
    for name in ("base", "mixlora", "plain order"):
        with counted_products() as count:
            lanes[name].step()
        flops[name] = count["flops"]
    times = measure(lanes, rounds)
    bench.release(list(lanes.values()))
    rows = PREFILL if prefill else batch
    return {
        "step": "prefill" if prefill else "decode",
        "batch": batch,
        "distinct": distinct,
        "rows": rows,
        "milliseconds": {name: round(value * 1e3, 2) for name, value in times.items()},
        "mixlora_over_base": round(times["mixlora"] / times["base"], 3),
        "mixlora_over_lora": round(times["mixlora"] / times["lora"], 3),
        "tokenwise_over_lora": round(times["tokenwise"] / times["lora"], 3),
        "plain_over_mixlora": round(times["plain order"] / times["mixlora"], 3),
        "base_flops_over_dense": {name: round(value / (2 * rows * BASE_WEIGHTS), 3) for name, value in flops.items()},
        "base_gflop": round(2 * rows * BASE_WEIGHTS / 1e9, 2),
        "adapter_mb": {kind: round(_bytes_read(bench, names[kind], batch) / 1e6, 1) for kind in KINDS},
    }


def _sizes(spec: AdapterSpec) -> tuple[float, float]:
    """Bytes of the pairs that every row takes, and of those of all experts."""
    plain = sum(p.a.nbytes + p.b.nbytes for p in spec.pairs if p.expert is None)
    return plain, sum(p.a.nbytes + p.b.nbytes for p in spec.pairs) - plain


def _bytes_read(bench: Bench, identities: list[str], batch: int) -> float:
    """Adapter bytes that a decode step needs at least: each distinct adapter once, of a mixture its chosen experts."""
    total = 0.0
    for identity in dict.fromkeys(identities):
        spec, (plain, experts) = bench.specs[identity], bench.bytes[identity]
        rows = -(-batch // len(identities))
        share = min(1.0, rows * spec.routing.limit / spec.routing.num_experts) if spec.routing else 0.0
        total += plain + experts * share
    return total


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| step | batch | distinct | base ms | LoRA | MixLoRA | token-wise | plain order | MixLoRA/base |"
        " MixLoRA/LoRA | plain/MixLoRA | base FLOPs, ours | plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in cells:
        ms, flops = one["milliseconds"], one["base_flops_over_dense"]
        lines.append(
            f"| {one['step']} | {one['batch']} | {one['distinct']} | {ms['base']} | {ms['lora']} | {ms['mixlora']} |"
            f" {ms['tokenwise']} | {ms['plain order']} | {one['mixlora_over_base']} | {one['mixlora_over_lora']} |"
            f" {one['plain_over_mixlora']} | {flops['mixlora']}x | {flops['plain order']}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--distinct", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--pool-gb", type=float, default=10.5)
    parser.add_argument("--threads", type=int, help="default: one for each core")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(int(arguments.pool_gb * 1e9), arguments.threads)
    worst = check(bench)
    record: dict[str, Any] = {"benchmark": "mixture", "machine": describe(), "largest_difference": worst}
    record["matmul_gflops"] = round(matmul_rate(torch.float32) / 1e9, 1)
    record["read_gb_per_s"] = round(read_bandwidth() / 1e9, 1)
    cells: list[dict[str, Any]] = []
    steps = [*((False, batch) for batch in arguments.batches), (True, 1), (True, 16)]
    for distinct, (prefill, batch) in product(arguments.distinct, steps):
        if batch == 1 < distinct:
            continue
        rounds = max(2, arguments.rounds // 2) if prefill else arguments.rounds
        cells.append(cell(bench, batch, distinct, prefill=prefill, rounds=rounds))
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    record["cells"] = cells
    bench.engine.close()
    print(table(cells))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
