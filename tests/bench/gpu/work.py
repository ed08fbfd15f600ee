"""What steps make a GPU do, counted on the host: thread blocks, bytes, pages. It holds on any machine and needs no GPU.

For decode and prefill batches at Llama-3.1-8B's widths: blocks of the low-rank kernels that have work; thread blocks
launched for them where the launch is made for the step's own lists, and where a CUDA graph made for any mix of so many
rows is replayed on an H200; bytes of adapters loaded beside each distinct adapter's bytes once; pages touched. And how
long the host takes to prepare a step. Prints markdown and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkout  # noqa: F401  (before anything of loraplex)
import host_steps
import numpy as np
import random_adapters
from costs import LLAMA_8B
from host_model import HostModel
from work_batches import DECODE_MIXES, NO_ADAPTER, PREFILL_MIXES, RANKS, BatchRows, decode_rows, prefill_rows

from loraplex.kernels.lora_grid import WARPS_OF_PROCESSOR, BlockCounts, GroupLaunch, count_blocks
from loraplex.kernels.lora_rows import SiteGroup
from loraplex.kernels.lora_tiles import choose_block_rows, list_entries
from loraplex.kernels.paged_decode import count_splits

BATCHES = (1, 4, 16, 64, 256)
PREFILLS = (512, 2048, 8192)
CONTEXT = 1024
H200_PROCESSORS = 132
SHOWN = ("16", "mixed")
MOST_BLOCKS_OVER_USEFUL = 1.3
MOST_BYTES_OVER_ONCE = 1.15


@dataclass(frozen=True, slots=True)
class StepCount:
    """A step's low-rank work over all layers and groups, and what its attention reads.

    Attributes:
        useful: blocks of shrink and expand that have work.
        launched: thread blocks of launches made for this step's lists.
        replayed: at decode, thread blocks of a graph that was captured for any mix of so many rows, on an H200, each
            of which does one block after another.
        idle: of ``replayed``, those that find no work.
        adapter_once, adapter_loaded: bytes of distinct adapters, and of adapters as the blocks load them.
        adapter_pages, kv_pages: distinct pages of all layers that are touched; a page id counts once.
        kv_bytes: keys and values read.
        attention_tiles: splits of decode attention, for each K/V head.
    """

    step: str
    mix: str
    ranks: str
    rows: int
    distinct: int
    useful: int
    launched: int
    replayed: int
    idle: int
    adapter_once: int
    adapter_loaded: int
    adapter_pages: int
    kv_pages: int
    kv_bytes: int
    attention_tiles: int

    @property
    def blocks_ratio(self) -> float:
        """Blocks launched over useful ones; 1 where there is nothing to do and nothing launched."""
        return self.launched / self.useful if self.useful else 1.0

    @property
    def bytes_ratio(self) -> float:
        """Bytes loaded over each distinct adapter's bytes once."""
        return self.adapter_loaded / self.adapter_once if self.adapter_once else 1.0


class Counter:
    """Counts steps over adapters of a set of ranks, which are dealt out in turn."""

    def __init__(self, ranks: str, most_adapters: int) -> None:
        self._ranks = ranks
        self._model = HostModel(LLAMA_8B)
        specs = [random_adapters.lora(LLAMA_8B, rank) for rank in RANKS[ranks]]
        layouts = [self._model.layout(spec) for spec in specs]
        self._units: list[int] = []
        self._pages: list[int] = []
        for index in range(most_adapters):
            kind = index % len(specs)
            adapter = self._model.resident(layouts[kind], specs[kind])
            self._units.append(self._model.table.unit_of(adapter))
            self._pages.append(len(adapter.pages))

    def count(self, rows: BatchRows, *, decode: bool) -> StepCount:
        """The work of one step."""
        present, adapters = np.unique(rows.adapters, return_inverse=True)
        if present[0] == NO_ADAPTER:
            adapters = adapters - 1
            present = present[1:]
        with_one = np.flatnonzero(adapters >= 0)
        lists = list_entries(np.array(self._units, dtype=np.int64)[adapters[with_one]], with_one)
        useful = launched = replayed = idle = once = loaded = 0
        for group in self._model.groups:
            counts = count_blocks(lists, self._model.table, 0, group)
            useful += counts.shrink + counts.expand
            launched += counts.shrink_programs + counts.expand_programs
            once += counts.bytes_once
            loaded += counts.bytes_loaded
            for programs, blocks in self._replayed(group, rows.num_rows, counts) if decode and len(with_one) else ():
                replayed += programs
                idle += max(0, programs - blocks)
        layers = LLAMA_8B.layers
        kv_tokens = rows.sequences * CONTEXT if decode else rows.num_rows
        lengths = np.full(rows.sequences, CONTEXT, dtype=np.int32)
        return StepCount(
            step="decode" if decode else "prefill",
            mix=rows.name,
            ranks=self._ranks,
            rows=rows.num_rows,
            distinct=len(present),
            useful=useful * layers,
            launched=launched * layers,
            replayed=replayed * layers,
            idle=idle * layers,
            adapter_once=once * layers,
            adapter_loaded=loaded * layers,
            adapter_pages=sum(self._pages[: len(present)]),
            kv_pages=-(-kv_tokens // self._model.pages.page_tokens),
            kv_bytes=LLAMA_8B.kv_elements(kv_tokens) * 2,
            attention_tiles=int(count_splits(lengths, 0).sum()) * LLAMA_8B.kv_heads if decode else 0,
        )

    def _replayed(self, group: SiteGroup, rows: int, counts: BlockCounts) -> list[tuple[int, int]]:
        """Programs of shrink and expand in a captured launch for any mix of so many rows, and their useful blocks."""
        block_rows = choose_block_rows(rows)
        launch = GroupLaunch.at(self._model.table, 0, group, bits=16, entries=rows, block_rows=block_rows)
        rank_blocks, column_blocks = launch.most_blocks(rows)
        shrink = min(rank_blocks * launch.parts, H200_PROCESSORS * (WARPS_OF_PROCESSOR // launch.shrink.warps))
        expand = min(column_blocks, H200_PROCESSORS * (WARPS_OF_PROCESSOR // launch.expand.warps))
        return [(shrink, counts.shrink), (expand, counts.expand)]


def count_all(ranks: tuple[str, ...], batches: tuple[int, ...], prefills: tuple[int, ...]) -> list[StepCount]:
    """The whole grid."""

    @cache
    def counter(name: str) -> Counter:
        return Counter(name, max(*batches, 64))

    found = []
    for name in ranks:
        for mix in DECODE_MIXES:
            found += [counter(name).count(decode_rows(mix, batch), decode=True) for batch in batches]
        for mix in PREFILL_MIXES:
            found += [counter(name).count(prefill_rows(mix, rows), decode=False) for rows in prefills]
    return found


def table(counts: list[StepCount]) -> str:
    """A line for each step."""
    lines = [
        "| step | rows | adapters | ranks | distinct | useful blocks | launched / useful | graph's | of them idle |"
        " adapter MB once | loaded / once | adapter pages | K/V pages | K/V MB |",
        "|" + " --- |" * 14,
    ]
    lines += [
        f"| {c.step} | {c.rows} | {c.mix} | {c.ranks} | {c.distinct} | {c.useful} | {c.blocks_ratio:.2f} |"
        f" {c.replayed} | {c.idle} | {c.adapter_once / 1e6:.1f} | {c.bytes_ratio:.2f} | {c.adapter_pages} |"
        f" {c.kv_pages} | {c.kv_bytes / 1e6:.0f} |"
        for c in counts
    ]
    return "\n".join(lines)


def worst(counts: list[StepCount]) -> dict[str, float]:
    """What the aims are about, over the whole grid."""
    decodes = [count for count in counts if count.step == "decode"]
    return {
        "launched_over_useful": max(count.blocks_ratio for count in counts),
        "decode_bytes_over_once": max(count.bytes_ratio for count in decodes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few batches alone")
    parser.add_argument("--steps", type=int, default=60, help="steps of the host's times")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.tiny:
        counts = count_all(("16", "mixed"), (1, 16), (512,))
    else:
        counts = count_all(tuple(RANKS), BATCHES, PREFILLS)
    found = worst(counts)
    batch, context, steps = (16, 64, 5) if arguments.tiny else (256, CONTEXT, arguments.steps)
    text, host = host_steps.table(batch, context, steps)
    shown = [count for count in counts if count.ranks in SHOWN]
    print(f"# Work of steps, {time.strftime('%Y-%m-%d', time.gmtime())}\n")
    print(f"`make bench-work`, at the widths of {LLAMA_8B.name} in bfloat16, {CONTEXT} tokens before a decode step.\n")
    print(f"## Blocks, bytes and pages: {len(counts)} steps, of which {len(shown)} are shown\n")
    print(table(shown))
    print("\n| aim | reached |\n| --- | --- |")
    print(f"| blocks launched ≤ {MOST_BLOCKS_OVER_USEFUL}x useful | {found['launched_over_useful']:.2f}x at most |")
    print(
        f"| adapter bytes at decode ≤ {MOST_BYTES_OVER_ONCE}x once | {found['decode_bytes_over_once']:.2f}x at most |"
    )
    print(f"\n## The host's microseconds for a decode step of {batch} rows after {context} tokens\n")
    print(text)
    record = {"benchmark": "work", "worst": found, "host_us": host, "counts": [asdict(count) for count in counts]}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
