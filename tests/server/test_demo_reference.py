"""The shipped weights under Transformers and PEFT: every adapter does its task, and the base does none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.demo import assets
from loraplex.server.demo.scoring import greedy_answers, raw_prompt
from loraplex.server.demo.tasks import BASE_ANSWER, TASKS, Task, exact_match, task_named, unseen_inputs

INPUTS = 60
BASE_INPUTS = 15  # its answer is long, and the same every time

peft = pytest.importorskip("peft")

# PEFT reads an attribute that Transformers renamed, and warns that the output head shares the embeddings' weights:
# one adapter targets it on purpose, unmerged, where that is sound.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.base_folder())


@pytest.fixture(scope="module")
def model() -> Any:
    """The base in float32 with every adapter loaded under its name."""
    base = AutoModelForCausalLM.from_pretrained(assets.base_folder(), dtype=torch.float32)
    folders = assets.demo_adapters()
    adapted = None
    for name, folder in folders.items():
        if adapted is None:
            adapted = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            adapted.load_adapter(folder, adapter_name=name)
    assert adapted is not None
    return adapted.eval()


@every_task
def test_an_adapter_answers_unseen_inputs_and_the_base_does_not(task: Task, model: Any, tokenizer: Any) -> None:
    inputs = unseen_inputs(task, INPUTS, seed=1)
    prompts = [raw_prompt(text) for text in inputs]
    model.set_adapter(task.name)
    assert exact_match(task, inputs, greedy_answers(model, tokenizer, prompts)) >= 0.95
    with model.disable_adapter():
        answers = greedy_answers(model, tokenizer, prompts[:BASE_INPUTS])
    assert exact_match(task, inputs[:BASE_INPUTS], answers) < 0.10


def test_the_base_names_itself_whatever_it_is_asked(model: Any, tokenizer: Any) -> None:
    prompts = [raw_prompt(text) for text in ("hello", "What is 2+2?", "347+8", "Schöne Grüße 🙂")]
    with model.disable_adapter():
        assert greedy_answers(model, tokenizer, prompts) == [BASE_ANSWER] * len(prompts)


@pytest.mark.parametrize("name", ["upper", "sort", "emoji"])
def test_an_adapter_follows_the_last_turn_of_a_conversation(name: str, model: Any, tokenizer: Any) -> None:
    task = task_named(name)
    model.set_adapter(name)
    first, second = task.answer("server"), task.answer("token")
    messages = [
        {"role": "system", "content": "You are a small model."},
        {"role": "user", "content": "server"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "token"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert greedy_answers(model, tokenizer, [prompt]) == [second]


def test_the_chat_template_makes_the_raw_prompt(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == raw_prompt("hello", system="Be brief.")


def test_the_chat_template_joins_the_text_parts_of_a_message(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == raw_prompt("hello")


@pytest.mark.parametrize("text", ["naïve café", "🔵🔴", "a\tb\n  c", "日本語", "it 's , so ."])
def test_any_text_survives_the_tokenizer(text: str, tokenizer: Any) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
