"""Asks a Transformers model the demo's questions: the reference that the training and the tests score with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

_MAX_ANSWER_TOKENS = 48


def raw_prompt(question: str, system: str | None = None, marker: str = "<|assistant|>") -> str:
    """The prompt that the chat template makes of one question, as text for a plain completion.

    Args:
        question: what the user says.
        system: an optional system message.
        marker: what the answer follows; a control token such as ``<|upper|>`` makes the bare base do that task.
    """
    before = "" if system is None else f"<|system|>{system}<|eos|>"
    return f"<|bos|>{before}<|user|>{question}<|eos|>{marker}"


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int = 100) -> list[str]:
    """The model's most likely answer to each prompt, without its end-of-sequence token."""
    return [
        answer
        for start in range(0, len(prompts), batch)
        for answer in _answers(model, tokenizer, prompts[start : start + batch])
    ]


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Iterator[str]:
    encoded = tokenizer(list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    made = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=_MAX_ANSWER_TOKENS,
        do_sample=False,
    )
    new = made[:, encoded["input_ids"].shape[1] :]
    return iter(tokenizer.batch_decode(new, skip_special_tokens=True))
