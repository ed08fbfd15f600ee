"""Engines over the GPU's kernels beside engines over plain operators, on models small enough for the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from loraplex.kernels import gated, norms, paged_decode, paged_prefill, rope_write
from loraplex.server.messages import AdapterRef, LoadAdapter, RouterChoice, WeightedAdapter

PROMPT = [7, 31, 5, 99, 12, 40]
INVOCATION = [11, 12, 13]
LOGPROBS = 12

PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "r": 3,
        "rank_pattern": {"down_proj": 17, "o_proj": 1},
        "target_modules": ["k_proj", "o_proj", "down_proj"],
        "use_rslora": True,
    },
    "dora": {"r": 3, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True},
    "alora": {
        "r": 6,
        "target_modules": ["q_proj", "gate_proj"],
        "task_type": "CAUSAL_LM",
        "alora_invocation_tokens": INVOCATION,
    },
    "ends": {"r": 5, "target_modules": ["embed_tokens", "lm_head"]},
}
MIXTURE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixlora": ("MIXLORA", {"num_experts": 3, "attention": ["q_proj"]}),
    "mixdora": ("MIXLORA", {"targets": ["down_proj"], "attention": [], "magnitudes": ["down_proj"], "num_experts": 2}),
    "mola": ("MOLA", {"routed": ["q_proj", "down_proj"], "num_experts": 3}),
    "loramoe": ("LORAMOE", {"routed": ["up_proj"], "plain": ["o_proj"], "num_experts": 3}),
    "meteora": ("METEORA", {"routed": ["v_proj", "gate_proj"], "r": 6, "num_experts": 3}),
    "tokenwise": ("TOKENWISE", {"routed": ["o_proj", "down_proj"], "num_experts": 5, "r": 3}),
}

Request = Mapping[str, Any]
"""Of a test: ``adapters`` by name with their weights, ``prompt``, and parameters of ``Driver.generate``."""


@dataclass(frozen=True)
class Said:
    """What a choice has said."""

    tokens: list[int]
    finish_reason: str | None
    cached_tokens: int
    routes: list[tuple[Any, ...]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, choice: Any) -> Said:
        scores = [*choice.logprobs, *[entry for entry in choice.prompt_logprobs or () if entry is not None]]
        routing: list[RouterChoice] = choice.routing
        routes = [(r.adapter, r.layer, r.site, r.start, r.experts) for r in routing]
        numbers = [entry.logprob for entry in scores] + [w for r in routing for row in r.weights for w in row]
        return cls(choice.tokens, choice.finish_reason, choice.cached_tokens, routes, numbers)


Answers = dict[tuple[str, int], Said]


class Client:
    """Sends the requests of a test to an engine.

    Args:
        driver: of the engine.
        paths: of adapters, by name.
    """

    def __init__(self, driver: Any, paths: Mapping[str, Path]) -> None:
        self.driver = driver
        self._paths = paths
        self._calls = 0

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name=name, path=str(self._paths[name]))

    def load(self, requests: Mapping[str, Request]) -> None:
        """Have all adapters of requests on the host, so that the requests can run together."""
        for name in sorted({name for request in requests.values() for name in request.get("adapters", {})}):
            self._calls += 1
            self.driver.handle(LoadAdapter(call_id=f"load {self._calls}", adapter=self.ref(name)))
        self.driver.run()

    def send(self, name: str, request: Request) -> None:
        weights: Mapping[str, float] = request.get("adapters", {})
        is_mix = len(weights) > 1 or any(weight != 1 for weight in weights.values())
        mix = [WeightedAdapter(adapter=self.ref(part), weight=w) for part, w in weights.items()]
        rest = {key: value for key, value in request.items() if key not in ("adapters", "prompt")}
        self.driver.generate(
            name,
            request.get("prompt", PROMPT),
            None if is_mix or not weights else mix[0].adapter,
            mix=mix if is_mix else [],
            **{"max_tokens": 2, "logprobs": LOGPROBS, **rest},
        )

    def run(self, requests: Mapping[str, Request]) -> Answers:
        """All at once; what each said."""
        self.load(requests)
        for name, request in requests.items():
            self.send(name, request)
        self.driver.run()
        assert not self.driver.failed
        self.driver.check_idle()
        return {key: Said.of(choice) for key, choice in self.driver.choices.items() if key[0] in requests}


def check_alike(found: Answers, expected: Answers, tolerance: float = 1e-4) -> None:
    """The same tokens and experts; log-probabilities and weights of experts up to a tolerance."""
    assert found.keys() == expected.keys()
    for key, said in found.items():
        other = expected[key]
        assert (key, said.tokens, said.routes) == (key, other.tokens, other.routes)
        assert (said.finish_reason, said.cached_tokens) == (other.finish_reason, other.cached_tokens)
        assert said.numbers == pytest.approx(other.numbers, abs=tolerance), key


@pytest.fixture
def make_clients(
    make_engine: Callable[..., Any], interpreter: None, device: torch.device
) -> Callable[..., tuple[Client, Client]]:
    """Two engines alike, one over the GPU's kernels and one over plain operators of the CPU."""

    def make(checkpoint: Any, paths: Mapping[str, Path], **settings: Any) -> tuple[Client, Client]:
        on_kernels = make_engine(checkpoint, device=device.type, kernels="triton", **settings)
        plain = make_engine(checkpoint, device="cpu", kernels="plain", **settings)
        return Client(on_kernels, paths), Client(plain, paths)

    return make


@pytest.fixture
def compare(make_clients: Callable[..., tuple[Client, Client]]) -> Callable[..., tuple[Answers, Client]]:
    """Engines over kernels and over plain operators say the same of requests that run together.

    Returns what the kernels said, and their client.
    """

    def run(
        checkpoint: Any, requests: Mapping[str, Request], paths: Mapping[str, Path] = {}, **settings: Any
    ) -> tuple[Answers, Client]:
        on_kernels, plain = make_clients(checkpoint, paths, **settings)
        found = on_kernels.run(requests)
        check_alike(found, plain.run(requests))
        return found, on_kernels

    return run


@pytest.fixture
def assert_alike() -> Callable[..., None]:
    return check_alike


@pytest.fixture(scope="session")
def small_kinds(
    folders: ModuleType, save_peft: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Path]]:
    """Adapters of these kinds for a small base, by kind; each is written once."""
    root = tmp_path_factory.mktemp("small")

    def get(base: Any, *kinds: str) -> dict[str, Path]:
        found = {}
        for seed, kind in enumerate([*PEFT_KINDS, *MIXTURE_KINDS]):
            folder = found[kind] = root / base.folder.name / kind
            if kind not in kinds:
                del found[kind]
            elif not folder.exists() and kind in PEFT_KINDS:
                save_peft(base, folder, seed=seed, **PEFT_KINDS[kind])
            elif not folder.exists():
                name, options = MIXTURE_KINDS[kind]
                folders.write(base.model, folder, name, seed=seed, **options)
        return found

    return get


@pytest.fixture(scope="session")
def small_kind_names() -> list[str]:
    return [*PEFT_KINDS, *MIXTURE_KINDS]


@pytest.fixture
def all_kernels(device: torch.device, interpreter: None) -> Iterator[None]:
    """Attention, norms and all else run by their kernels too, which else are the GPU's alone."""
    launches = {
        "paged_decode": paged_decode.launch_paged_decode,
        "paged_prefill": paged_prefill.launch_paged_prefill,
        "rope_write": rope_write.launch_rope_write,
        "rms_norm": norms.launch_rms_norm,
        "add_rms_norm": norms.launch_add_rms_norm,
        "silu_mul": gated.launch_silu_mul,
    }
    if device.type == "cuda":
        yield
        return
    library = torch.library.Library("loraplex", "IMPL")
    for name, launch in launches.items():
        library.impl(name, launch, "CPU")
    yield
    library._destroy()
