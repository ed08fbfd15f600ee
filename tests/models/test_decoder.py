"""The decoder's logits against transformers', for checkpoints that transformers saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.kernels.attention_plan import AttentionPlanner, SequenceSpan
from loraplex.memory.arena import allocate_arena, page_shape
from loraplex.server.checkpoint import read_config
from loraplex.server.decoder import Decoder, DecoderInput
from loraplex.server.traits import read_traits
from loraplex.server.weights import CheckpointReader, load_weights

CPU = torch.device("cpu")
PAGES = [[3, 9, 5, 20, 2, 31, 8], [7, 1, 30, 12, 25, 6, 19]]
STEPS = [
    [(0, 0, 20)],
    [(0, 20, 33), (1, 0, 45)],
    [(1, 45, 46), (0, 33, 34)],
    [(0, 34, 35), (1, 46, 50)],
    [(0, 35, 50)],
]
"""Sequence, start, stop: prompts in chunks, decoding beside them."""


def chunked_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, 50, vocabulary] logits of two texts, computed in ``STEPS``, in an arena that is NaN at first."""
    traits = read_traits(read_config(folder))
    decoder = Decoder(traits, load_weights(CheckpointReader(folder), traits, dtype, CPU))
    shape = page_shape(traits.num_layers, traits.kv_size, 8, dtype)
    arena = allocate_arena(shape, 32, CPU).fill_(float("nan"))
    planner = AttentionPlanner(shape.page_tokens, tuple(set(traits.windows)), dtype, CPU)
    found: list[list[torch.Tensor]] = [[], []]
    for step in STEPS:
        spans, tokens = [], []
        for sequence, start, stop in step:
            spans.append(SequenceSpan(len(tokens), start, stop, PAGES[sequence]))
            tokens += ids[sequence, start:stop].tolist()
        rows = torch.arange(len(tokens))
        with torch.inference_mode():
            logits = decoder.forward(DecoderInput(torch.tensor(tokens), planner.plan(spans), None, rows, None), arena)
        for (sequence, _, _), part in zip(step, logits.split([stop - start for _, start, stop in step])):
            found[sequence].append(part)
    return torch.stack([torch.cat(parts) for parts in found])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(5))


def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits.float()


NAMES = [
    "llama",
    "llama-biased",
    "llama3",
    "llama-linear",
    "llama-yarn",
    "mistral",
    "mistral-full",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "qwen3-yarn",
]


def test_every_checkpoint_of_the_fixtures_is_compared(config_names: list[str]) -> None:
    assert config_names == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(checkpoints: Callable[[str], Any], ids: torch.Tensor, name: str) -> None:
    checkpoint = checkpoints(name)
    expected = reference_logits(checkpoint.model, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(chunked_logits(checkpoint.folder, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2"])
def test_sharded_checkpoints_are_read(
    checkpoints: Callable[[str], Any], ids: torch.Tensor, name: str, tmp_path: Path
) -> None:
    checkpoint = checkpoints(name)
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole = chunked_logits(checkpoint.folder, ids)
    assert torch.equal(chunked_logits(tmp_path, ids), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_checkpoints_are_read_exactly(
    checkpoints: Callable[[str], Any], ids: torch.Tensor, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = checkpoints("qwen3").folder
    model = type(checkpoints("qwen3").model).from_pretrained(folder, dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    assert read_traits(read_config(tmp_path)).torch_dtype == dtype
    expected = reference_logits(model.float(), ids)
    torch.testing.assert_close(chunked_logits(tmp_path, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-biased", "mistral", "qwen3"])
def test_half_precision_logits_are_as_near_as_those_of_transformers(
    checkpoints: Callable[[str], Any], ids: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    checkpoint = checkpoints(name)
    exact = reference_logits(checkpoint.model, ids)
    theirs = type(checkpoint.model).from_pretrained(checkpoint.folder, dtype=dtype).eval()
    their_error = (reference_logits(theirs, ids) - exact).square().mean().sqrt()
    our_error = (chunked_logits(checkpoint.folder, ids, dtype) - exact).square().mean().sqrt()
    assert our_error <= 1.25 * their_error


def test_a_checkpoint_whose_tied_head_is_stored_too_is_read(
    checkpoints: Callable[[str], Any], ids: torch.Tensor, tmp_path: Path, edit_tensors: Any
) -> None:
    folder = shutil.copytree(checkpoints("llama3").folder, tmp_path / "copy")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(chunked_logits(folder, ids), chunked_logits(checkpoints("llama3").folder, ids))


def test_no_logits_are_made_where_none_are_wanted(checkpoints: Callable[[str], Any]) -> None:
    folder = checkpoints("llama").folder
    traits = read_traits(read_config(folder))
    decoder = Decoder(traits, load_weights(CheckpointReader(folder), traits, torch.float32, CPU))
    arena = allocate_arena(page_shape(traits.num_layers, traits.kv_size, 16, torch.float32), 4, CPU)
    plan = AttentionPlanner(16, (None,), torch.float32, CPU).plan([SequenceSpan(0, 0, 3, [2])])
    with torch.inference_mode():
        step = DecoderInput(torch.tensor([5, 6, 7]), plan, None, torch.empty(0, dtype=torch.int64), None)
        assert decoder.forward(step, arena).shape == (0, 300)
