"""The demo's models in transformers, PEFT and plain torch, and one way to compare their numbers with the server's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.demo.assets import adapters_folder, base_folder
from loraplex.server.demo.kinds import KINDS
from loraplex.server.demo.mixture_files import load_mixture

NUM_TOP = 5
MIXTURES = {adapter.name for adapter in KINDS if adapter.kind in {"MIXLORA", "TOKENWISE"}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The plain programs leave the processor to the server."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def client(demo: Any) -> Any:
    with demo.openai() as client:
        yield client


@pytest.fixture(scope="session")
def encode() -> Callable[[str], list[int]]:
    """Token ids of a text, markers included."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="session")
def bare_model() -> Callable[[], Any]:
    """A new base model of the demo in float32."""
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def peft_model(bare_model: Callable[[], Any]) -> Callable[[Path], Any]:
    """The base model with an adapter folder on it, as PEFT reads it."""

    def read(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(bare_model(), folder).eval()

    return read


@pytest.fixture(scope="session")
def reference(bare_model: Callable[[], Any], peft_model: Callable[[Path], Any]) -> Callable[[str], Any]:
    """The base with one of the demo's adapters: mixtures by the demo's own plain reader, all others by PEFT."""

    @cache
    def make(name: str) -> Any:
        if name not in MIXTURES:
            return peft_model(adapters_folder() / name)
        model = bare_model()
        load_mixture(model, adapters_folder() / name)
        return model.float().eval()

    return make


@pytest.fixture(scope="session")
def top_of() -> Callable[[Any, list[int]], torch.Tensor]:
    """``top_of(model, ids)``: the best log-probabilities behind each token, ``[tokens, 5]``."""

    def score(model: Any, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1).topk(NUM_TOP).values

    return score


def _best(told: Any) -> torch.Tensor:
    """The largest values that an answer's ``top_logprobs`` have; the first token of a prompt has none."""
    return torch.tensor([sorted(top.values(), reverse=True)[:NUM_TOP] for top in told.top_logprobs if top])


@pytest.fixture
def served_top(client: Any) -> Callable[..., torch.Tensor]:
    """``served_top(ids, adapter_id=...)``: what the server says behind each token of a prompt but its last."""

    def score(ids: list[int], **named: Any) -> torch.Tensor:
        answer = client.completions.create(
            model="loraplex-demo", prompt=ids, echo=True, max_tokens=0, logprobs=NUM_TOP, extra_body=named
        )
        return _best(answer.choices[0].logprobs)

    return score


@pytest.fixture
def generate(client: Any) -> Callable[..., tuple[Any, torch.Tensor]]:
    """``generate(ids, adapter_id=...)``: six greedy tokens, and the best log-probabilities at each, ``[6, 5]``."""

    def run(ids: list[int], **named: Any) -> tuple[Any, torch.Tensor]:
        answer = client.completions.create(
            model="loraplex-demo",
            prompt=ids,
            max_tokens=6,
            temperature=0,
            logprobs=NUM_TOP,
            extra_body={"ignore_eos": True, **named},
        )
        return answer, _best(answer.choices[0].logprobs)

    return run


@pytest.fixture
def assert_near() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Log-probabilities that are the same but for rounding in float32."""

    def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)

    return check
