"""How long an adapter takes to come up: from its file to the host store, and from there into the pool.

Beside each stands what the machine needs at least: reading the file, and copying as many bytes. They take turns, so
that whatever else the machine does falls on all of them alike; the ratios are of medians. With the page cache warm,
and, where the kernel drops pages when it is asked to, with the file on disk. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe
from safetensors.torch import save_file

from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_image import AdapterImage, build_image
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_spec import LAYER_SITES, BaseShape
from loraplex.memory.adapter_store import AdapterStore, Ready
from loraplex.memory.store_reading import bounded_reader
from loraplex.memory.transfer import page_in


@dataclass(frozen=True)
class Model:
    """Of which an adapter on all linears is loaded."""

    name: str
    layers: int
    hidden: int
    ffn: int
    kv: int

    @property
    def base_shape(self) -> BaseShape:
        hidden, ffn, kv = self.hidden, self.ffn, self.kv
        wide = {"k_proj": (hidden, kv), "v_proj": (hidden, kv), "down_proj": (ffn, hidden)}
        wide |= {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn)}
        return BaseShape(self.layers, {site: wide.get(site, (hidden, hidden)) for site in LAYER_SITES}, {})

    @property
    def page_elems(self) -> int:
        return 16 * 2 * self.kv


MODELS = (Model("0.37B", 24, 896, 4864, 128), Model("8B", 32, 4096, 14336, 1024))
TINY = (Model("tiny", 2, 128, 256, 64),)


def save_adapter(folder: Path, model: Model, rank: int, dtype: torch.dtype) -> Path:
    """A PEFT LoRA of random numbers; returns its tensors' file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(model.layers):
        for site, (width, out) in model.base_shape.sites.items():
            block = "self_attn" if site in LAYER_SITES[:4] else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{site}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LAYER_SITES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


class Loader:
    """Loads one adapter into a host store again and again."""

    def __init__(self, model: Model, file: Path, dtype: torch.dtype) -> None:
        self._done = threading.Event()
        shape, limit = model.base_shape, 1 << 28
        self._store = AdapterStore(
            shape,
            model.page_elems,
            dtype,
            byte_limit=limit,
            reader=bounded_reader(read_source, shape, dtype, limit),
            threads=1,
            on_change=self._done.set,
        )
        self._path = str(file.parent)
        self._revision = 0

    def load(self) -> None:
        self._done.clear()
        self._store.request(self._path, self._revision)
        assert self._done.wait(60)

    def image(self) -> AdapterImage:
        state = self._store.state(self._path, self._revision)
        assert isinstance(state, Ready), state
        return state.image

    def forget(self) -> None:
        self._store.forget(self._path, self._revision)
        self._revision += 1

    def close(self) -> None:
        self._store.close()


def seconds(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    before()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def drop_pages(file: Path) -> None:
    """Ask the kernel to forget what it has cached of a file."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each task; they take turns."""
    for task in tasks.values():
        task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            times[name].append(task())
    return {name: median(taken) for name, taken in times.items()}


def measure(model: Model, rank: int, dtype: torch.dtype, rounds: int, folder: Path) -> dict[str, Any]:
    file = save_adapter(folder / f"{model.name}-{rank}-{dtype}", model, rank, dtype)
    data = file.read_bytes()
    spec = read_adapter(file.parent, model.base_shape, dtype=dtype)
    loader = Loader(model, file, dtype)
    room = build_image(spec, model.layers, model.page_elems, dtype)

    def load() -> None:
        loader.load()

    def lay_out() -> None:
        build_image(spec, model.layers, model.page_elems, dtype, layout=room.layout, parts=room.parts)

    def cold() -> None:
        drop_pages(file)

    disk = interleaved(
        {
            "read": lambda: seconds(file.read_bytes),
            "load": lambda: seconds(load, loader.forget),
            "hash": lambda: seconds(lambda: sha256(data).digest()),
            "read_and_check": lambda: seconds(lambda: read_adapter(file.parent, model.base_shape, dtype=dtype)),
            "lay_out": lambda: seconds(lay_out),
            "read_cold": lambda: seconds(file.read_bytes, cold),
            "load_cold": lambda: seconds(load, lambda: (loader.forget(), cold())),
        },
        rounds,
    )
    loader.forget()
    loader.load()
    image = loader.image()
    arena = torch.zeros((model.layers, 2 * image.num_pages, model.page_elems), dtype=dtype)
    pages = list(range(image.num_pages // 2, image.num_pages // 2 + image.num_pages))
    scattered = list(range(0, 2 * image.num_pages, 2))
    source = torch.cat([part.view(-1) for part in image.parts])
    target = torch.empty_like(source)
    pool = interleaved(
        {
            "memcpy": lambda: seconds(lambda: target.copy_(source)),
            "page_in": lambda: seconds(lambda: page_in(image, arena, pages)),
            "page_in_scattered": lambda: seconds(lambda: page_in(image, arena, scattered)),
        },
        4 * rounds,
    )
    num_bytes = source.nbytes
    loader.close()
    return {
        "model": model.name,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "file_bytes": len(data),
        "image_bytes": num_bytes,
        "seconds": disk | pool,
        "load_over_read": disk["load"] / disk["read"],
        "load_over_read_cold": disk["load_cold"] / disk["read_cold"],
        "hash_over_read": disk["hash"] / disk["read"],
        "page_in_over_memcpy": pool["page_in"] / pool["memcpy"],
        "scattered_over_memcpy": pool["page_in_scattered"] / pool["memcpy"],
    }


def show(record: dict[str, Any]) -> None:
    taken = {name: f"{1e3 * value:.1f} ms" for name, value in record["seconds"].items()}
    print(f"{record['model']} r{record['rank']} {record['dtype']}, {record['file_bytes'] / 1e6:.1f} MB: {taken}")
    for name in (
        "load_over_read",
        "load_over_read_cold",
        "hash_over_read",
        "page_in_over_memcpy",
        "scattered_over_memcpy",
    ):
        print(f"  {name}: {record[name]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the copies into the pool")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the system's temporary one")
    parser.add_argument("--tiny", action="store_true", help="a check that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for model in TINY if arguments.tiny else MODELS:
            for dtype in (torch.bfloat16, torch.float32):
                records.append(measure(model, 16, dtype, arguments.rounds, Path(folder)))
                show(records[-1])
    print(json.dumps({"machine": describe(), "records": records}))


if __name__ == "__main__":
    main()
