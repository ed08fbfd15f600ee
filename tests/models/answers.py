"""Answers of engines and of PEFT in one form, to be compared."""

from __future__ import annotations

from typing import Any

import torch

Answer = tuple[list[int], torch.Tensor]
"""Tokens, and log-probabilities [positions, vocabulary] of each prompt token but the first and of each new token."""


def random_prompt(seed: int, length: int, vocab: int = 300) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=random).tolist()


def _rows(entries: list[Any]) -> torch.Tensor:
    """[entries, vocabulary]; entries name the whole vocabulary."""
    found = torch.full((len(entries), len(entries[0].top)), float("nan"))
    for row, entry in zip(found, entries):
        ids, values = zip(*entry.top)
        row[list(ids)] = torch.tensor(values)
    return found


def engine_answer(choice: Any) -> Answer:
    """Of a choice with the log-probabilities of the whole vocabulary, and of the prompt where it has them."""
    return choice.tokens, _rows([*(choice.prompt_logprobs or [None])[1:], *choice.logprobs])


def peft_answer(model: Any, prompt: list[int], new_tokens: int) -> Answer:
    """Of a transformers or PEFT model, greedily."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        result = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat([model(input_ids=ids).logits[0, :-1], torch.cat(result.logits)])
    return result.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1)


def assert_plain(choice: Any, reference: Any, prompt: list[int], tolerance: float = 1e-4) -> Any:
    """A greedy choice says what a ``PlainModel`` says, of its prompt too where it has log-probabilities of it.

    Returns what the model says. A route that float32 cannot tell from another proves nothing, and fails as well.
    """
    tokens, found = engine_answer(choice)
    answer = reference.answer([*prompt, *tokens[:-1]])
    assert answer.margin > 2e-6, "a route is too close to call in float32: take another seed"
    torch.testing.assert_close(found.double(), answer.logprobs[-len(found) :], rtol=0, atol=tolerance)
    assert tokens == answer.logprobs[len(prompt) - 1 :].argmax(dim=-1).tolist()
    return answer


def assert_same(found: Answer, expected: Answer, tolerance: float) -> None:
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=tolerance)
    assert found[0] == expected[0]
