"""Launching a step on a device: the host waits for nothing, and what a graph would record is the same for any mix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.kernels.step_buffers import HostRing
from loraplex.memory.transfer import AdapterTransfer
from loraplex.server import device_program
from loraplex.server.device_capacities import Capacities
from loraplex.server.device_program import StepProgram
from loraplex.server.device_runner import DeviceRunner

PROMPT = [7, 31, 5, 99, 12, 40]

WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "_unique2",
}
"""Operators whose result the host needs, or the size of it."""

READS = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
"""What reads a tensor from Python."""


class NoWaits(TorchDispatchMode):
    """Refuses operators on a GPU's tensors for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in WAITS, f"the host waits for {func}"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"the host waits for how many elements {func} selects"
        return func(*args, **(kwargs or {}))


class NoReads:
    """Refuses to read tensors, those of the host excepted, from Python and within operators too.

    Indexing by a mask is found by ``NoWaits``, outside of operators: a class whose ``__getitem__`` was once replaced
    looks like a sequence to Python ever after, and ``torch.tensor`` no longer takes scalars that are tensors.
    """

    def __init__(self) -> None:
        self.of_host: set[int] = set()
        self.paused = False

    def install(self, patches: pytest.MonkeyPatch) -> None:
        for name in READS:
            patches.setattr(torch.Tensor, name, self._refuse(name))

    def _refuse(self, name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            storage = tensor.untyped_storage().data_ptr()
            assert self.paused or storage in self.of_host, f"the host waits for Tensor.{name}"
            return read(tensor, *args, **kwargs)

        return refuse


@contextmanager
def refuse_waits(device: torch.device) -> Iterator[None]:
    """PyTorch's own check, which sees all but copies from memory that is not page-locked."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[], int]:
    """While steps are launched the host waits for nothing. Tells how many steps were watched."""
    launch, next_buffer = DeviceRunner.launch, HostRing.next
    reads = NoReads()
    launches = 0

    def watched_next(ring: HostRing, size: int) -> Any:
        reads.paused = True  # it may make a buffer of the host
        found, array = next_buffer(ring, size)
        reads.paused = False
        reads.of_host.add(found.untyped_storage().data_ptr())
        return found, array

    def watched_launch(runner: DeviceRunner, chunks: Any) -> Any:
        nonlocal launches
        launches += 1
        with pytest.MonkeyPatch.context() as patches, NoWaits(), refuse_waits(device):
            reads.install(patches)
            return launch(runner, chunks)

    monkeypatch.setattr(HostRing, "next", watched_next)
    monkeypatch.setattr(DeviceRunner, "launch", watched_launch)
    return lambda: launches


@pytest.mark.parametrize(
    "requests",
    [
        {
            "base": {"prompt_logprobs": 2},
            "random": {"adapters": {"lora": 1.0}, "temperature": 0.8, "top_p": 0.9, "seed": 3},
            "mix": {"adapters": {"lora": 0.5, "ends": 0.5}, "repetition_penalty": 1.1},
        },
        {
            "greedy": {"adapters": {"lora": 1.0}},
            "random": {"temperature": 1.0, "seed": 4, "logit_bias": {5: 1.0}},
            "filtered": {"temperature": 1.0, "seed": 5, "min_p": 0.1},
        },
        {"linears": {"adapters": {"mola": 1.0}}, "networks": {"adapters": {"mixlora": 1.0}}},
    ],
    ids=["prompts", "plain", "mixtures"],
)
def test_launching_a_step_waits_for_nothing(
    requests: dict[str, Any],
    no_waits: Callable[[], int],
    all_kernels: None,
    checkpoints: Callable[[str], Any],
    small_kinds: Any,
    make_clients: Callable[..., Any],
) -> None:
    base = checkpoints("small-llama")
    kinds = {kind for request in requests.values() for kind in request.get("adapters", {})}
    client, _ = make_clients(base, small_kinds(base, *kinds))
    client.run({name: {"prompt": PROMPT[:3], **request} for name, request in requests.items()})
    assert no_waits() >= 2


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.cpu(), bool])
def test_a_wait_within_an_operator_is_found(
    read: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = torch.library.Library("loraplex_waits", "DEF")
    library.define("read(Tensor x) -> Tensor")
    library.impl("read", lambda x: (read(x), x.clone())[1], "CompositeExplicitAutograd")
    NoReads().install(monkeypatch)
    try:
        with pytest.raises(AssertionError, match="the host waits"), NoWaits():
            torch.ops.loraplex_waits.read(torch.ones(1))
    finally:
        library._destroy()


class Launches(TorchDispatchMode):
    """Notes every operator with all that a graph would hold of it: numbers, shapes, and where tensors lie that were
    there before.

    Args:
        standing: where they begin, by name.
    """

    def __init__(self, standing: Mapping[int, str]) -> None:
        super().__init__()
        self._standing = standing
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), self._describe(args), self._describe(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:  # a weight, packed for a CPU
                return tuple(value.shape)
            place = self._standing.get(value.untyped_storage().data_ptr())
            where = None if place is None else (place, value.storage_offset())
            return (tuple(value.shape), value.stride(), value.dtype, where)
        if isinstance(value, list | tuple):
            return [self._describe(entry) for entry in value]
        if isinstance(value, dict):
            return {name: self._describe(entry) for name, entry in value.items()}
        return value


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[Capacities, list[Any]]:
    """By shape of the step, the launches of each run for any step of that shape."""
    found: dict[Capacities, list[Any]] = defaultdict(list)
    run = StepProgram.run

    def watched(program: StepProgram, batch: Any = None, *rest: Any) -> Any:
        machine = program._machine
        tensors = {"buffer": program.buffer, "work": program.work_buffer, "arena": machine.arena}
        tensors |= {"page table": machine.page_table, "sampled": machine.sampled}
        tensors |= {f"table {place}": tensor for place, tensor in enumerate([*machine.table.tensors])}
        standing = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
        launches = Launches(standing)
        with launches if batch is None else nullcontext():
            logits = run(program, batch, *rest)
        if batch is None:
            found[program.capacities].append(launches.calls)
        return logits

    monkeypatch.setattr(StepProgram, "run", watched)
    return found


@pytest.mark.without_gpu("there a captured step is replayed, not run")
def test_steps_of_one_shape_launch_the_same_whatever_their_mix(
    recorded: dict[Capacities, list[Any]],
    checkpoints: Callable[[str], Any],
    small_kinds: Any,
    make_clients: Callable[..., Any],
) -> None:
    base = checkpoints("small-llama")
    kinds = ("lora", "dora", "ends")
    client, _ = make_clients(base, small_kinds(base, *kinds))
    all_of_them = {kind: {"adapters": {kind: 1.0}} for kind in kinds}
    client.run(all_of_them)  # from here on the table knows of the largest rank, of gains, and of the model's sites
    recorded.clear()
    for turn, mix in enumerate((("lora", "dora"), ("ends", None), ("dora", "dora"))):
        requests: dict[str, dict[str, Any]] = {
            f"{turn} {place}": {"adapters": {} if kind is None else {kind: 1.0}, "prompt": PROMPT[: 1 + place + turn]}
            for place, kind in enumerate(mix)
        }
        client.run(requests)
    of_pairs = [runs for capacities, runs in recorded.items() if capacities.rows == 2 and capacities.entries]
    assert len(of_pairs) == 1, "one shape serves every mix of two rows"
    assert len(of_pairs[0]) >= 3
    for runs in recorded.values():
        for later in runs[1:]:
            assert later == runs[0]


def test_a_step_that_failed_leaves_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Callable[[str], Any],
    small_kinds: Any,
    make_clients: Callable[..., Any],
) -> None:
    base = checkpoints("small-llama")
    client, plain = make_clients(base, small_kinds(base, "lora"))
    requests = {"a": {"adapters": {"lora": 1.0}, "max_tokens": 2}}
    client.load(requests)
    with monkeypatch.context() as patches:
        patches.setattr(StepProgram, "run", lambda *_: np.zeros(1)[2])
        client.send("fails", requests["a"])
        client.driver.run()
    assert set(client.driver.failed) == {"fails"}
    client.driver.failed.clear()
    found, expected = client.run(requests), plain.run(requests)
    assert found["a", 0].tokens == expected["a", 0].tokens


def test_an_adapter_that_comes_back_takes_the_place_that_it_had(
    checkpoints: Callable[[str], Any], small_kinds: Any, make_clients: Callable[..., Any]
) -> None:
    base = checkpoints("small-llama")
    client, _ = make_clients(base, small_kinds(base, "lora"))
    client.run({"a": {"adapters": {"lora": 1.0}, "max_tokens": 1}})
    parts = client.driver.engine._parts
    runner, image = parts.runner, parts.directory.image(client.ref("lora"))
    table, adapter = runner._machine.table, runner._resident[image.identity]
    unit = table.unit_of(adapter)
    runner.page_in(image, adapter.pages)
    assert table.unit_of(runner._resident[image.identity]) == unit
    client.run({"b": {"adapters": {"lora": 1.0}, "max_tokens": 1}})


@pytest.mark.without_gpu("its failure is stood in for")
def test_a_device_that_can_be_used_no_more_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Any], make_clients: Callable[..., Any]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    client, _ = make_clients(checkpoints("small-llama"), {})
    monkeypatch.setattr(StepProgram, "run", fail)
    monkeypatch.setattr(client.driver.engine._parts.runner, "_is_cuda", True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    client.send("fails", {})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        client.driver.run()


class FakeGraphs:
    """Stands for CUDA's graphs: notes into which pool they are captured, and lets the host do nothing meanwhile."""

    def __init__(self) -> None:
        self.captured: list[tuple[Any, str]] = []
        self.pools = 0

    def install(self, patches: pytest.MonkeyPatch, runner: Any) -> None:
        patches.setattr(runner, "_is_cuda", True)
        patches.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
        patches.setattr(torch.cuda, "CUDAGraph", object)
        patches.setattr(torch.cuda, "graph", self._capture)
        patches.setattr(torch.cuda, "graph_pool_handle", self._new_pool)
        patches.setattr(torch.cuda, "synchronize", lambda _: None)
        patches.setattr(device_program, "borrowed", lambda tensor: tensor)
        patches.setattr(StepProgram, "replay", lambda program: program.run())

    def _new_pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def _capture(self, graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.captured.append((pool, capture_error_mode))
        with pytest.MonkeyPatch.context() as patches:
            for owner, name in (
                (torch, "from_numpy"),
                (torch, "tensor"),
                (torch.Tensor, "pin_memory"),
                (torch.cuda, "synchronize"),
                (torch.cuda, "Event"),
                (HostRing, "next"),
                (HostRing, "send"),
                (AdapterTransfer, "collect"),
            ):
                patches.setattr(owner, name, self._refuse(name))
            yield

    @staticmethod
    def _refuse(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{name} while a graph is captured")

        return refuse


@pytest.mark.without_gpu("graphs are stood in for")
def test_each_shape_is_captured_once_and_beside_threads_that_pin_memory(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Callable[[str], Any],
    small_kinds: Any,
    make_clients: Callable[..., Any],
) -> None:
    base = checkpoints("small-llama")
    client, plain = make_clients(base, small_kinds(base, "lora"))
    graphs = FakeGraphs()
    graphs.install(monkeypatch, client.driver.engine._parts.runner)
    requests = {
        "first": {"max_tokens": 4},
        "second": {"max_tokens": 4, "adapters": {"lora": 1.0}},
        "third": {"max_tokens": 2},
    }
    found = client.run(requests)
    assert {key: said.tokens for key, said in found.items()} == {
        key: said.tokens for key, said in plain.run(requests).items()
    }
    shapes = client.driver.engine._parts.runner._programs
    assert len(shapes) > 1
    assert graphs.captured == [(1, "thread_local")] * len(shapes)


@pytest.mark.without_gpu("graphs are stood in for")
def test_a_pool_whose_graphs_are_all_gone_is_not_captured_into_again(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Any], make_clients: Callable[..., Any]
) -> None:
    client, _ = make_clients(checkpoints("small-llama"), {})
    runner = client.driver.engine._parts.runner
    graphs = FakeGraphs()
    graphs.install(monkeypatch, runner)
    client.run({"before": {"max_tokens": 3}})
    runner._programs.clear()
    client.run({"after": {"max_tokens": 3}})
    assert [pool for pool, _ in graphs.captured] == [1, 1, 2, 2], "the prompt's shape and the decoding's, each time"
