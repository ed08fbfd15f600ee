"""Everything between a request's adapter and its pages but the model: store, slab, caches, scheduler and calls, under
anything in any order, over folders whose content changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, LowRankPair
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import LruOrder, ValueOrder
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PrefixCache
from loraplex.memory.transfer import TransferStats
from loraplex.server.adapter_view import AdapterView
from loraplex.server.engine import Engine
from loraplex.server.engine_build import engine_parts
from loraplex.server.engine_config import EngineConfig
from loraplex.server.host_directory import HostDirectory
from loraplex.server.messages import (
    AdapterRef,
    AdapterStates,
    CallDone,
    CallFailed,
    EngineInfo,
    Generate,
    LoadAdapter,
    OutputBatch,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    RestoredAdapter,
    SamplingParams,
    UnloadAdapter,
    WeightedAdapter,
)
from loraplex.server.rebuild_costs import RebuildCosts
from loraplex.server.scheduler_config import SchedulerConfig
from loraplex.server.step_plan import Chunk, FinishedStep, SampledToken, StepResult
from loraplex.server.tiers_build import Tiers

SHAPE = BaseShape(1, {"q_proj": (128, 128)}, {})
UNIT = 2 * 128 * 4
"""Bytes of an image of rank 1; it takes two pages."""

PATHS = [f"/adapters/{name}" for name in "abcdefg"]
RANKS = dict(zip(PATHS, (1, 1, 2, 2, 3, 5, 30)))


class Files:
    """Folders with a content that changes; broken ones cannot be read."""

    def __init__(self) -> None:
        self.content = dict.fromkeys(PATHS, 0)
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def identity(self, path: str) -> str:
        return f"{path} {self.content[path]}"

    def read(self, path: str) -> AdapterSpec:
        assert self.gate.wait(30)
        if path in self.broken:
            raise AdapterFileError(f"{path} is broken", key="tensor")
        identity, rank = self.identity(path), RANKS[path]
        value = float(mark(identity))
        pair = LowRankPair("q_proj", 0, torch.full((rank, 128), value), torch.full((128, rank), value), 1.0)
        return AdapterSpec(identity, "lora", (pair,))


def mark(identity: str) -> int:
    """A number that stands for a content, exact in float32."""
    path, content = identity.split()
    return 1000 * PATHS.index(path) + int(content) + 1


class Runner:
    """Copies as late as can be, and checks that whatever a chunk reads is there, and is what its request began with."""

    runs_ahead = False

    def __init__(self, adapters: AdapterCache) -> None:
        self.adapters = adapters
        self.transfers = TransferStats()
        self.expert_tokens: dict[str, list[int]] = {}
        self.under_way: dict[str, tuple[AdapterImage, list[int]]] = {}
        self.pages: dict[int, tuple[str, int]] = {}
        self.served: dict[AdapterRef, str] = {}
        self.lazy = False
        self.fails = False
        self.faults: list[str] = []
        self.steps = 0

    def check(self, is_so: bool, fault: str) -> None:
        """The engine takes errors for failed steps; so what must not be is noted."""
        if not is_so:
            self.faults.append(fault)

    def page_in(self, image: AdapterImage, pages: list[int]) -> None:
        self.check(image.identity not in self.under_way, "it is on its way already")
        self.under_way[image.identity] = image, pages

    def has_arrived(self, identity: str) -> bool:
        if not self.lazy:
            self.arrive(identity)
        return identity not in self.under_way

    def arrive(self, identity: str) -> None:
        image, pages = self.under_way.pop(identity, (None, []))
        if image is not None:
            self.check(bool((image.data == mark(identity)).all()), "the image has been overwritten on the host")
            self.pages |= {page: (identity, at) for at, page in enumerate(pages)}

    def forget(self, identities: Iterable[str]) -> None:
        for identity in identities:
            self.check(identity not in self.under_way, "it was put out while it came in")

    def forget_all(self) -> None:
        self.under_way.clear()
        self.pages.clear()

    def launch(self, chunks: list[Chunk]) -> FinishedStep:
        if self.fails:
            self.fails = False
            raise RuntimeError("the step failed")
        self.steps += 1
        sampled: dict[int, SampledToken] = {}
        for chunk in chunks:
            request = chunk.sequence.request
            if len(request.weights) == 1:
                (ref,), ((identity, _),) = request.weights, chunk.adapters
                self.check(self.served.setdefault(ref, identity) == identity, "one registration, two contents")
                self.check(identity.split()[0] == ref.path, "another's content")
            for identity, _ in chunk.adapters:
                self.arrive(identity)
                for at, page in enumerate(self.adapters.pages(identity)):
                    self.check(self.pages.get(page) == (identity, at), "an adapter's page holds something else")
            if chunk.samples:
                sampled[chunk.sequence.seq_id] = SampledToken(7)
        return FinishedStep(StepResult(sampled))


class TiersMachine(RuleBasedStateMachine):
    """Names move, files change, break and mend, loads are slow, calls come in any order; pool and host are small."""

    @initialize(pages=st.integers(14, 40), units=st.integers(6, 14), by_value=st.booleans())
    def start(self, pages: int, units: int, by_value: bool) -> None:
        self.now = 100.0
        self.files = Files()
        clock = lambda: self.now  # noqa: E731
        rates = ArrivalRates(5.0, clock=clock)
        order = ValueOrder if by_value else LruOrder
        store = AdapterStore(
            SHAPE,
            128,
            torch.float32,
            byte_limit=units * UNIT,
            reader=self.files.read,
            clock=clock,
            rates=rates,
            order=order(),
            sleep=lambda seconds: None,
        )
        costs = RebuildCosts(store, 4, 512)
        self.freed: list[int] = []
        pool = PagePool(pages, on_release=self.forget_pages, order=order())
        adapters = AdapterCache(pool, rates, costs.of_adapter)
        kv = KvCache(pool, 4, PrefixCache(pool, rates, costs.of_page))
        directory = HostDirectory(store, adapters, pages, 1)
        self.tiers = Tiers(pool, kv, adapters, store, directory, rates, rates, costs, None)
        info = EngineInfo(
            model_path="", architecture="", dtype="float32", device="cpu", vocab_size=100, max_model_len=100,
            num_pages=pages, page_tokens=4, page_bytes=512, num_parameters=0,
        )  # fmt: skip
        limits = SchedulerConfig(max_model_len=100, max_running=4, max_batch_tokens=16, max_loading=3, look_ahead=6)
        self.runner = Runner(adapters)
        config = EngineConfig(model="", max_pinned_fraction=0.4)
        parts = engine_parts(info, self.tiers, limits, self.runner, config)
        costs.transfers = self.runner.transfers
        self.scheduler = parts.scheduler
        self.directory = directory
        self.engine = Engine(parts, stats_interval=0.0)
        self.view = AdapterView()
        self.refs = {path: AdapterRef(name=path, path=path) for path in PATHS}
        self.revision = self.count = 0
        self.open: set[str] = set()
        self.calls: set[str] = set()

    def let_the_host_forget(self) -> None:
        """Everything that nobody holds leaves the host."""
        images = self.tiers.store._images
        with self.tiers.store._changed:
            while images._order.size:
                images._order.put_out_first()

    def forget_pages(self, pages: list[int]) -> None:
        for page in pages:
            self.runner.pages.pop(page, None)

    def step(self) -> None:
        for event in self.engine.step():
            match event:
                case OutputBatch(outputs=outputs, failed=failed):
                    ended = [output.request_id for output in outputs if output.finish_reason]
                    for name in [*ended, *(failure.request_id for failure in failed)]:
                        self.open.remove(name)  # each ends once
                case CallDone(call_id=call_id) | CallFailed(call_id=call_id):
                    self.calls.remove(call_id)
                case AdapterStates(states=states):
                    self.view.update(states)
                case _:
                    pass

    @rule(path=st.sampled_from(PATHS), prompt=st.integers(1, 20), tokens=st.integers(1, 20), other=st.booleans())
    def ask(self, path: str, prompt: int, tokens: int, other: bool) -> None:
        self.count += 1
        name = str(self.count)
        self.open.add(name)
        second = PATHS[(PATHS.index(path) + 1) % len(PATHS)]
        mix = tuple(WeightedAdapter(adapter=self.refs[one], weight=0.5) for one in (path, second)) if other else ()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self.engine.handle(
            Generate(
                request_id=name,
                prompt_ids=list(range(prompt)),
                params=params,
                adapter=None if mix else self.refs[path],
                mix=mix,
            )
        )

    def call(self, make: Any) -> None:
        self.count += 1
        self.calls.add(f"call {self.count}")
        self.engine.handle(make(f"call {self.count}"))

    @rule(path=st.sampled_from(PATHS))
    def load(self, path: str) -> None:
        self.call(lambda call_id: LoadAdapter(call_id=call_id, adapter=self.refs[path]))

    @rule(path=st.sampled_from(PATHS), tier=st.sampled_from(["host", "pool"]))
    def prefetch(self, path: str, tier: Any) -> None:
        self.call(lambda call_id: PrefetchAdapter(call_id=call_id, adapter=self.refs[path], tier=tier))

    @rule(path=st.sampled_from(PATHS), pinned=st.booleans())
    def pin(self, path: str, pinned: bool) -> None:
        self.call(lambda call_id: PinAdapter(call_id=call_id, adapter=self.refs[path], pinned=pinned))

    @rule(path=st.sampled_from(PATHS), changes=st.booleans())
    def move(self, path: str, changes: bool) -> None:
        """A name gets another registration, often because its files have changed."""
        self.files.content[path] += changes
        old = self.refs[path]
        self.revision += 1
        self.refs[path] = AdapterRef(name=path, path=path, revision=self.revision)
        self.call(lambda call_id: UnloadAdapter(call_id=call_id, adapter=old))
        self.view.forget(old)

    @rule(path=st.sampled_from(PATHS))
    def change_files(self, path: str) -> None:
        self.files.content[path] += 1

    @rule(path=st.sampled_from(PATHS))
    def break_files(self, path: str) -> None:
        self.files.broken ^= {path}

    @rule(path=st.sampled_from(PATHS))
    def expect(self, path: str) -> None:
        identity = self.files.identity(path)
        if self.runner.served.get(self.refs[path], identity) == identity:
            restored = RestoredAdapter(adapter=self.refs[path], identity=identity)
            self.engine.handle(RestoreAdapters(adapters=[restored]))

    @rule()
    def hold_up_reads(self) -> None:
        self.files.gate.clear()

    @rule()
    def let_reads_go(self) -> None:
        self.files.gate.set()

    @rule(lazy=st.booleans())
    def copy_lazily(self, lazy: bool) -> None:
        self.runner.lazy = lazy

    @rule(seconds=st.sampled_from([0.5, 6.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(steps=st.integers(1, 10))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            time.sleep(0.0002 if self.files.gate.is_set() else 0)

    @precondition(lambda self: self.count % 7 == 3)
    @rule()
    def fail_a_step(self) -> None:
        self.runner.fails = True
        self.step()
        self.runner.fails = False

    @invariant()
    def owners_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            self.tiers.store.check_integrity()
            assert not self.runner.faults

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.files.gate.set()
        self.runner.lazy = False
        for path in PATHS:
            self.pin(path, False)  # one that cannot be read would be tried for ever
        deadline = time.monotonic() + 30
        while self.engine.has_work or self.tiers.store.stats.loading:
            self.step()
            self.now += 1.0  # mixes that keep each other from the host are given up
            time.sleep(0.0005)
            assert time.monotonic() < deadline, f"{self.open} and {self.calls} do not end"
        self.step()
        self.engine.check_integrity()
        assert not self.open
        assert not self.calls
        assert not self.runner.faults
        self.check_mirror()
        self.engine.close()

    def check_mirror(self) -> None:
        for path, ref in self.refs.items():
            told = self.view.state(ref)
            content = self.tiers.directory.content_of(told.info.identity) if told.info else None
            if content is not None:
                assert told.tier == self.tiers.directory.tier(content.identity), path
            assert told.pinned == self.is_pinned(ref), path

    def is_pinned(self, ref: AdapterRef) -> bool:
        return self.engine._parts.calls.is_pinned((ref.path, ref.revision))
