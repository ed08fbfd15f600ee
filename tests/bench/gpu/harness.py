"""An engine around random weights, taken apart for measurements: adapters put in by hand, steps of chosen rows, the
device's share of a step alone. All that benchmarks know of the engine's inside is here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from costs import ModelShape
from random_adapters import random_image
from random_base import Base
from runner_steps import steps_of
from safetensors.torch import save_file
from shared_images import SharedImages
from timing import captured, synchronize

from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.memory.arena import page_shape
from loraplex.server import engine_build
from loraplex.server.adapter_calls import AdapterCalls
from loraplex.server.adapter_reports import AdapterReports
from loraplex.server.engine import Engine
from loraplex.server.engine_config import EngineConfig, KernelsName
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import AdapterRef, EngineInfo, Generate, SamplingParams, TokenLogprob
from loraplex.server.request import make_request
from loraplex.server.scheduler import Scheduler
from loraplex.server.step_plan import Chunk

PAGE_TOKENS = 16
_KEY_SPREAD = 0.1
_FIRST_LANE_ID = 1 << 40  # above any id that the scheduler gives


@dataclass(frozen=True, slots=True)
class Lane:
    """Sequences with pages in the pool, and the tokens of each that a step computes."""

    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


class Harness:
    """An engine of random weights whose pool holds random keys and values.

    Args:
        base: its weights; harnesses may share them.
        pool_bytes: of the pool.
        max_running, max_batch_tokens, prefill_chunk, kernels: as in the engine's configuration.
    """

    def __init__(
        self,
        base: Base,
        pool_bytes: int,
        *,
        max_running: int = 256,
        max_batch_tokens: int = 2048,
        prefill_chunk: int = 512,
        kernels: KernelsName = "auto",
    ) -> None:
        self.base = base
        self.shape: ModelShape = base.shape
        self.device = base.device
        self._next_lane_id = _FIRST_LANE_ID
        pages = page_shape(base.shape.layers, base.traits.kv_size, PAGE_TOKENS, base.dtype)
        config = EngineConfig(
            model="random weights",
            device="cuda" if base.device.type == "cuda" else "cpu",
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            max_waiting=1 << 20,
            prefill_chunk=prefill_chunk,
            page_tokens=PAGE_TOKENS,
            prefix_caching=False,
            kernels=kernels,
        )
        self._folder = tempfile.TemporaryDirectory()
        save_file({}, Path(self._folder.name) / "model.safetensors")
        info = EngineInfo(
            model_path=self._folder.name,
            architecture=base.traits.architecture,
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            vocab_size=base.shape.vocabulary,
            max_model_len=base.shape.max_positions,
            num_pages=max(1, pool_bytes // pages.page_bytes),
            page_tokens=pages.page_tokens,
            page_bytes=pages.page_bytes,
            num_parameters=0,
        )
        parts = engine_build._wire(config, info, base.traits, base.weights(), pages, base.device, frozenset(), None)
        self._page_elems = pages.page_elems
        self.images = SharedImages()
        scheduler = Scheduler(parts.scheduler._config, parts.pool, parts.kv, parts.adapters, self.images)
        directory = cast(HostDirectory, self.images)
        calls = AdapterCalls(directory, scheduler.prefetcher, 0, scheduler.num_open_under)
        self._parts = replace(
            parts,
            directory=directory,
            scheduler=scheduler,
            calls=calls,
            reports=AdapterReports(directory, parts.store, parts.adapters, calls, info.page_bytes),
            history=None,
        )
        self._runner = parts.runner
        self._steps = steps_of(parts.runner)
        self.engine = Engine(self._parts, stats_interval=1e9)
        self._fill_pool()

    def _fill_pool(self) -> None:
        """Keys and values as of a context that was computed; NaN would be as quick, but not every number is."""
        for layer in self._steps.arena:
            layer.normal_(0, _KEY_SPREAD)

    def close(self) -> None:
        """Stop its threads and let go of its pool."""
        self.engine.close()
        self._folder.cleanup()

    # Adapters.

    def image(self, spec: AdapterSpec, seed: int = 0) -> AdapterImage:
        """Random numbers laid out as the description says, in pinned memory where that matters."""
        pinned = self.device.type == "cuda"
        return random_image(spec, self.shape.layers, self._page_elems, self.base.dtype, pin_memory=pinned, seed=seed)

    def register(self, image: AdapterImage, count: int = 1) -> list[AdapterRef]:
        """So many adapters on the host, all with the numbers of one image."""
        return [self.images.put(replace(image, identity=f"{image.identity}-{index}")) for index in range(count)]

    def make_resident(self, refs: Sequence[AdapterRef]) -> None:
        """Put adapters into the pool and keep them there."""
        for ref in refs:
            image = self.images.image(ref)
            pages = self._parts.adapters.admit(image.identity, image.num_pages)
            if pages is not None:
                self._runner.page_in(image, pages)
            self._parts.adapters.pin(image.identity)
        synchronize(self.device)

    def let_go(self, refs: Sequence[AdapterRef]) -> None:
        """Undo ``make_resident``: the adapters leave the pool."""
        for ref in refs:
            self._parts.adapters.unpin(ref.path)
        self.put_out(refs)

    def put_out(self, refs: Sequence[AdapterRef]) -> None:
        """Forget adapters in the pool that nobody uses."""
        for ref in refs:
            self._parts.adapters.drop(ref.path)
        self._runner.forget([ref.path for ref in refs if not self._parts.adapters.is_resident(ref.path)])

    # Steps of chosen rows.

    def decode_lane(self, refs: Sequence[AdapterRef | None], context: int, *, logprobs: int | None = None) -> Lane:
        """One sequence for each adapter, ``context`` tokens in the pool and one to compute."""
        return Lane([self._chunk(ref, context, context + 1, logprobs) for ref in refs])

    def prefill_lane(self, refs: Sequence[AdapterRef | None], rows: int, *, logprobs: int | None = None) -> Lane:
        """One prompt of ``rows`` tokens for each adapter, none of it computed."""
        return Lane([self._chunk(ref, 0, rows, logprobs) for ref in refs])

    def _chunk(self, ref: AdapterRef | None, start: int, stop: int, logprobs: int | None) -> Chunk:
        generator = torch.Generator().manual_seed(stop)
        prompt = torch.randint(3, self.shape.vocabulary, (stop,), generator=generator).tolist()
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        request = make_request(
            Generate(request_id="lane", prompt_ids=prompt, params=params),
            first_seq_id=self._next_lane_id,
            arrival=0.0,
            max_total_tokens=self.shape.max_positions,
            eos_token_ids=frozenset(),
        )
        self._next_lane_id += 1
        sequence = request.sequences[0]
        self._parts.kv.extend(sequence.seq_id, stop)
        adapters = ((ref.path, 1.0),) if ref is not None else ()
        return Chunk(sequence, start, stop, True, adapters, 0, False)

    def release(self, lane: Lane) -> None:
        """Give up a lane's pages."""
        for chunk in lane.chunks:
            self._parts.kv.release(chunk.sequence.seq_id, keep=False)

    def pages(self, seq_id: int) -> torch.Tensor:
        """[layers, pages, page_elems], what a lane's sequence has in the pool."""
        return self._steps.arena[:, self._parts.kv.pages(seq_id)]

    def write_pages(self, seq_id: int, pages: torch.Tensor) -> None:
        """Give a lane's sequence other keys and values."""
        arena = self._steps.arena
        arena[:, self._parts.kv.pages(seq_id)] = pages.to(arena.device, arena.dtype)

    def step(self, lane: Lane) -> list[TokenLogprob | None]:
        """One whole step of a lane: the host's work, the device's, and the sampled tokens back. The last token of each
        sequence is another one than the last time, so that nothing that depends on it can be kept."""
        for chunk in lane.chunks:
            prompt = chunk.sequence.prompt_ids
            prompt[-1] = 3 + (prompt[-1] + 97) % (self.shape.vocabulary - 3)
        sampled = self._runner.launch(lane.chunks).result().sampled
        return [sampled[chunk.sequence.seq_id].logprob for chunk in lane.chunks]

    def prepare(self, lane: Lane) -> object:
        """The host's work of a step alone: its arrays."""
        return self._steps.prepare(lane.chunks)

    def device_work(self, lane: Lane, *, graph: bool = True) -> Callable[[], object]:
        """The device's work of one step of a lane, to be run any number of times; as a CUDA graph where it can be."""
        return self._steps.device_work(lane.chunks, graph=graph)

    def lora_work(self, lane: Lane) -> Callable[[], object]:
        """What the adapters of a lane add to the base products, of all layers and groups, without the base."""
        adapters, arena = self._steps.adapters(lane.chunks), self._steps.arena
        groups = self._steps.decoder.layer_groups

        def tensors(widths: list[int]) -> list[torch.Tensor]:
            return [torch.randn((lane.num_rows, width), device=self.device).to(arena.dtype) for width in widths]

        xs = tensors([group.in_features for group in groups])
        ys = tensors([sum(group.out_features) for group in groups])

        @torch.inference_mode()
        def add() -> None:
            for layer in range(self.shape.layers):
                chunks = arena[layer].view(-1, 128)
                for group, x, y in zip(groups, xs, ys):
                    adapters.add(y, x, chunks, layer, group, None)

        return captured(add, self.device)
