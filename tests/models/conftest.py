"""Tiny checkpoints of every architecture as transformers saves them, adapters as PEFT saves them, and a way to drive
an engine step by step."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loraplex.memory.arena import page_shape
from loraplex.server.checkpoint import read_config
from loraplex.server.engine import Engine
from loraplex.server.engine_build import build_engine
from loraplex.server.engine_config import EngineConfig
from loraplex.server.messages import (
    AdapterRef,
    AdapterState,
    AdapterStates,
    CallDone,
    CallFailed,
    Command,
    ErrorInfo,
    Generate,
    OutputBatch,
    RouterChoice,
    SamplingParams,
    TokenLogprob,
    WeightedAdapter,
)
from loraplex.server.traits import read_traits

VOCAB = 300
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama-biased": lambda: LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, head_dim=24),
    "llama3": lambda: LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear": lambda: LlamaConfig(**{**TINY, "num_key_value_heads": 4}, rope_parameters=LINEAR_ROPE),
    "llama-yarn": lambda: LlamaConfig(**TINY, rope_parameters=YARN_ROPE),
    "mistral": lambda: MistralConfig(**TINY, sliding_window=7, head_dim=16),
    "mistral-full": lambda: MistralConfig(**{**TINY, "num_key_value_heads": 1}, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**TINY),
    "qwen2-sliding": lambda: Qwen2Config(**TINY, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=32),
    "qwen3-yarn": lambda: Qwen3Config(**TINY, head_dim=32, attention_bias=True, rope_parameters=YARN_ROPE),
}

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
SMALL_CONFIGS: dict[str, Callable[[], Any]] = {
    "small-llama": lambda: LlamaConfig(**SMALL),
    "small-tied": lambda: LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, tie_word_embeddings=True),
    "small-biased": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "small-mistral": lambda: MistralConfig(**{**SMALL, "num_hidden_layers": 2}, sliding_window=5),
    "small-qwen2": lambda: Qwen2Config(
        **{**SMALL, "num_hidden_layers": 2}, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "small-qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
}
"""For engines in Triton's interpreter."""

SavePeft = Callable[..., Path]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers saved, and the model that it saved."""

    folder: Path
    model: Any

    def page_bytes(self, page_tokens: int = 16) -> int:
        traits = read_traits(read_config(self.folder))
        return page_shape(traits.num_layers, traits.kv_size, page_tokens, torch.float32).page_bytes


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower on two threads, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """By name of ``CONFIGS`` or ``SMALL_CONFIGS``; made on first use."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config((CONFIGS | SMALL_CONFIGS)[name](), dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.1)
                else:
                    parameter.data.add_(torch.randn_like(parameter) * 0.1)
            folder = tmp_path_factory.mktemp("base") / name
            model.save_pretrained(folder)
            made[name] = Checkpoint(folder, model)
        return made[name]

    return get


@pytest.fixture
def llama(checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoints("llama")


@pytest.fixture(scope="session")
def config_names() -> list[str]:
    return list(CONFIGS)


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests cannot import by its name."""
    spec = importlib.util.spec_from_file_location(f"tests_models_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """``adapter_folders.py``: writes adapters of every kind."""
    return load_beside("adapter_folders")


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """``plain_model.py``: the reference."""
    return load_beside("plain_model")


@pytest.fixture(scope="session")
def answers() -> ModuleType:
    """``answers.py``: answers in one form."""
    return load_beside("answers")


@pytest.fixture(scope="session")
def save_peft() -> SavePeft:
    """Saves an adapter with random weights as PEFT does, DoRA's magnitudes 0.5 to 1.5 times what they start as.

    ``use(model)`` sees the PEFT model first.
    """

    def save(checkpoint: Checkpoint, folder: Path, *, seed: int = 0, use: Any = None, **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
            model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.data.mul_(0.5 + torch.rand_like(parameter))
                elif "lora_" in name:
                    parameter.data.normal_(0, 0.15)
            model.save_pretrained(folder, save_embedding_layers=False)
            if use is not None:
                use(model)
        return folder

    return save


INVOCATION = [11, 12, 13]
PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]},
    "rslora": {"r": 5, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 3, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "use_dora": True},
    "alora": {"r": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION},
}
MIXTURE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixlora": ("MIXLORA", {}),
    "mixlora-dynamic": ("MIXLORA", {"routing_strategy": "mixlora-dynamic", "num_experts": 8, "r": 2}),
    "mixlora-switch": ("MIXLORA", {"routing_strategy": "mixlora-switch", "targets": ["up_proj"], "act_fn": "gelu"}),
    "mixdora": ("MIXLORA", {"magnitudes": ["gate_proj", "down_proj", "q_proj"], "num_experts": 3, "top_k": 3}),
    "mola": ("MOLA", {"routed": ["q_proj", "k_proj", "gate_proj", "down_proj"]}),
    "loramoe": ("LORAMOE", {"routed": ["gate_proj", "up_proj", "down_proj"], "plain": ["q_proj", "o_proj"]}),
    "meteora": ("METEORA", {"routed": ["v_proj", "up_proj", "down_proj"], "r": 6}),
    "tokenwise": ("TOKENWISE", {"num_experts": 5, "r": 3}),
}


@pytest.fixture(scope="session")
def every_kind(
    folders: ModuleType, save_peft: SavePeft, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Checkpoint], dict[str, Path]]:
    """One adapter of every kind for a base, by kind. The activated one's tokens are 11, 12, 13."""
    made: dict[Path, dict[str, Path]] = {}

    def get(base: Checkpoint) -> dict[str, Path]:
        if base.folder not in made:
            root = tmp_path_factory.mktemp("kinds")
            paths = made[base.folder] = {}
            for seed, (name, options) in enumerate(PEFT_KINDS.items()):
                paths[name] = save_peft(base, root / name, seed=seed, **options)
            for seed, (name, (kind, mixture)) in enumerate(MIXTURE_KINDS.items()):
                paths[name] = folders.write(base.model, root / name, kind, seed=seed, **mixture)
        return made[base.folder]

    return get


@pytest.fixture(scope="session")
def hundred_adapters(
    checkpoints: Callable[[str], Checkpoint], save_peft: SavePeft, tmp_path_factory: pytest.TempPathFactory
) -> list[AdapterRef]:
    """Adapters for "llama", of ranks 2 and 4 by turns: two that PEFT saved, the others with tensors of their own."""
    root = tmp_path_factory.mktemp("hundred")
    targets = ["q_proj", "v_proj", "down_proj"]
    for rank in (2, 4):
        save_peft(checkpoints("llama"), root / f"peft-{rank}", r=rank, target_modules=targets)
    refs = []
    for i in range(100):
        source, folder = root / f"peft-{2 + 2 * (i % 2)}", root / f"adapter-{i}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        torch.manual_seed(1000 + i)
        tensors = {k: torch.randn_like(v) * 0.2 for k, v in load_file(source / "adapter_model.safetensors").items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        refs.append(AdapterRef(name=f"adapter-{i}", path=str(folder)))
    return refs


@dataclass
class Choice:
    """What one choice of a request has said so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    routing: list[RouterChoice] = field(default_factory=list)


class Driver:
    """An engine driven step by step. Fails where anything ends twice or speaks after its end.

    Args:
        patience: by how much longer it may take than an engine over plain operators of the CPU, as where kernels have
            to be compiled or are interpreted.

    Attributes:
        choices: by request id and index.
        failed: errors of requests.
        answers: of calls.
        states: what was told last of a registration, by path and revision.
    """

    def __init__(self, engine: Engine, patience: float = 1.0) -> None:
        self.engine = engine
        self._patience = patience
        self.choices: dict[tuple[str, int], Choice] = defaultdict(Choice)
        self.failed: dict[str, ErrorInfo] = {}
        self.answers: dict[str, CallDone | CallFailed] = {}
        self.states: dict[tuple[str, int], AdapterState] = {}
        self.aborted: set[str] = set()

    def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        adapter: AdapterRef | None = None,
        *,
        mix: Sequence[WeightedAdapter] = (),
        n: int = 1,
        max_tokens: int = 8,
        temperature: float = 0.0,
        ignore_eos: bool = True,
        return_routing: bool = False,
        cache_salt: str = "",
        **params: Any,
    ) -> None:
        command = Generate(
            request_id=request_id,
            prompt_ids=list(prompt),
            params=SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=ignore_eos, **params),
            adapter=adapter,
            mix=tuple(mix),
            n=n,
            return_routing=return_routing,
            cache_salt=cache_salt,
        )
        self.engine.handle(command)

    def handle(self, command: Command) -> None:
        self.engine.handle(command)

    def step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, OutputBatch):
                self._take_outputs(event)
            elif isinstance(event, CallDone | CallFailed):
                assert event.call_id not in self.answers, "a call was answered twice"
                self.answers[event.call_id] = event
            elif isinstance(event, AdapterStates):
                self.states.update({(state.path, state.revision): state for state in event.states})

    def state(self, ref: AdapterRef) -> AdapterState:
        """What the engine told last of a registration."""
        return self.states[ref.path, ref.revision]

    def _take_outputs(self, batch: OutputBatch) -> None:
        for output in batch.outputs:
            choice = self.choices[output.request_id, output.index]
            assert output.request_id not in self.failed, "an output after a failure"
            assert output.request_id not in self.aborted, "an output after an abort"
            assert choice.finish_reason is None, "an output after the end"
            choice.tokens += output.token_ids
            choice.logprobs += output.logprobs or []
            if output.prompt_logprobs is not None:
                assert choice.prompt_logprobs is None
                choice.prompt_logprobs = output.prompt_logprobs
            choice.finish_reason = output.finish_reason
            choice.cached_tokens += output.cached_tokens
            choice.routing += output.routing or []
        for failure in batch.failed:
            assert failure.request_id not in self.failed | dict.fromkeys(self.aborted), "a request ended twice"
            self.failed[failure.request_id] = failure.error

    def run(self, seconds: float = 60) -> None:
        """Step until nothing is open."""
        deadline = time.monotonic() + seconds * self._patience
        while self.engine.has_work:
            self.step()
            if not self.engine.is_runnable:
                time.sleep(0.002)
            assert time.monotonic() < deadline, "the engine does not come to an end"
        self.step()

    def step_until(self, is_so: Callable[[], bool], seconds: float = 30) -> None:
        """Step until a condition holds."""
        deadline = time.monotonic() + seconds * self._patience
        while not is_so():
            self.step()
            time.sleep(0 if self.engine.is_runnable else 0.002)
            assert time.monotonic() < deadline, "what is waited for does not come"

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        choice = self.choices[request_id, index]
        assert choice.finish_reason is not None
        return choice.tokens

    def check_idle(self) -> None:
        """Nothing is open, and every page is free, an idle adapter's, or a prefix's that nobody uses."""
        assert not self.engine.has_work
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.pages_kv) == (0, 0, 0)
        assert stats.pages_free + stats.pages_adapter + stats.pages_cached == stats.pages_total


ON_DEVICE: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cuda": {"device": "cuda", "max_running": 32},  # each bucket up to it is captured at the start
    "interpreter": {"device": "cpu", "kernels": "triton"},
}


@pytest.fixture
def make_engine(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Callable[..., Driver]]:
    """Builds engines with poisoned pages, to be driven by hand; closed, and checked for leaks, at the end."""
    engines: list[Engine] = []
    chosen = request.config.getoption("--device")
    on_device = ON_DEVICE[chosen]
    if chosen == "interpreter":
        request.getfixturevalue("interpreter")

    def make(checkpoint: Checkpoint, pages: int = 64, **settings: Any) -> Driver:
        page_tokens = settings.get("page_tokens", 16)
        config = EngineConfig(
            model=str(checkpoint.folder),
            **{
                "dtype": "float32",
                **on_device,
                "pool_bytes": pages * checkpoint.page_bytes(page_tokens),
                "poison_freed_pages": True,
                "threads": 1,
                **settings,
            },
        )
        engines.append(build_engine(config))
        return Driver(engines[-1], 4.0 if config.device == "cuda" or config.kernels == "triton" else 1.0)

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()


@pytest.fixture(scope="session")
def edit_tensors() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], None]:
    """Rewrites a folder's ``model.safetensors`` after a change."""

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit
