"""The demo's adapters of other kinds do their tasks, read from the shipped files with plain torch (DoRA: with PEFT)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.demo import assets
from loraplex.server.demo.kinds import KINDS, covered, kind_named
from loraplex.server.demo.mixture_files import load_mixture
from loraplex.server.demo.mixture_layers import routers
from loraplex.server.demo.scoring import greedy_answers, raw_prompt
from loraplex.server.demo.tasks import BASE_ANSWER, Task, exact_match, task_named, unseen_inputs

INPUTS = 60
SAME_WORDS = 20
BASE_INPUTS = 2  # its answer is long, and the same every time
WANTED = 0.90
MIXTURES = ("words-mixlora", "words-tokenwise")

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

every_mixture = pytest.mark.parametrize("name", MIXTURES)
every_covered_task = pytest.mark.parametrize(
    ("name", "task"),
    [pytest.param(kind.name, task, id=f"{kind.name}-{task.name}") for kind in KINDS for task in covered(kind)],
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.base_folder())


@pytest.fixture(scope="module")
def models() -> dict[str | None, Any]:
    """The bare base (under ``None``) and the base with each adapter, in float32."""
    models: dict[str | None, Any] = {None: bare_model()}
    for kind, folder in zip(KINDS, assets.kind_adapters().values(), strict=True):
        model = bare_model()
        if kind.kind == "DORA":
            model = peft.PeftModel.from_pretrained(model, folder)
        else:
            load_mixture(model, folder)
        models[kind.name] = model.eval()
    return models


def bare_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(assets.base_folder(), dtype=torch.float32).eval()


def prompts(tokenizer: Any, name: str, task: Task, questions: list[str]) -> list[str]:
    chats = [kind_named(name).messages(task, question) for question in questions]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


@every_covered_task
def test_an_adapter_answers_unseen_inputs_of_each_task_that_it_covers(
    name: str, task: Task, models: dict[str | None, Any], tokenizer: Any
) -> None:
    inputs = unseen_inputs(task, INPUTS, seed=1)
    answers = greedy_answers(models[name], tokenizer, prompts(tokenizer, name, task, inputs))
    assert exact_match(task, inputs, answers) >= WANTED


@every_covered_task
def test_the_base_answers_none_of_the_same_prompts(
    name: str, task: Task, models: dict[str | None, Any], tokenizer: Any
) -> None:
    asked = prompts(tokenizer, name, task, unseen_inputs(task, BASE_INPUTS, seed=1))
    assert greedy_answers(models[None], tokenizer, asked) == [BASE_ANSWER] * BASE_INPUTS


@every_mixture
def test_the_same_questions_get_the_answers_of_whatever_task_the_system_message_names(
    name: str, models: dict[str | None, Any], tokenizer: Any
) -> None:
    words = unseen_inputs(task_named("echo"), SAME_WORDS, seed=2)
    words = [word for word in words if len(task_named("devowel").answer(word)) > 0]
    answers = {
        task.name: greedy_answers(models[name], tokenizer, prompts(tokenizer, name, task, words))
        for task in covered(kind_named(name))
    }
    for task in covered(kind_named(name)):
        assert exact_match(task, words, answers[task.name]) >= WANTED
    assert all(len(set(of_word)) == len(answers) for of_word in zip(*answers.values(), strict=True))


@every_mixture
@pytest.mark.parametrize("system", [None, "You are a small model."])
def test_a_mixture_that_is_told_no_task_answers_like_the_base(
    name: str, system: str | None, models: dict[str | None, Any], tokenizer: Any
) -> None:
    asked = [raw_prompt(question, system) for question in ("hello", "token", "server")]
    assert greedy_answers(models[name], tokenizer, asked) == [BASE_ANSWER] * 3


@pytest.mark.parametrize(("name", "task"), [("words-mixlora", "spell"), ("words-tokenwise", "reverse")])
def test_a_mixture_follows_the_last_turn_of_a_conversation(
    name: str, task: str, models: dict[str | None, Any], tokenizer: Any
) -> None:
    answer = task_named(task).answer
    chat = [
        {"role": "system", "content": task},
        {"role": "user", "content": "server"},
        {"role": "assistant", "content": answer("server")},
        {"role": "user", "content": "token"},
    ]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert greedy_answers(models[name], tokenizer, [asked]) == [answer("token")]


@every_mixture
def test_every_router_uses_every_expert(name: str, models: dict[str | None, Any], tokenizer: Any) -> None:
    shares: list[torch.Tensor] = []
    found = routers(models[name])
    hooks = [
        router.register_forward_hook(
            lambda _router, _inputs, weights: shares.append((weights > 0).float().mean((0, 1)))
        )
        for router in found
    ]
    for task in covered(kind_named(name)):
        greedy_answers(models[name], tokenizer, prompts(tokenizer, name, task, unseen_inputs(task, 4)))
    for hook in hooks:
        hook.remove()
    for at in range(len(found)):
        used = torch.stack(shares[at :: len(found)]).mean(0)
        assert used.sum().item() == pytest.approx(2.0)
        assert used.min() >= 0.05


# Of the MixLoRA's tasks only this one needs the right experts: its LoRA on attention does most of the others.
@pytest.mark.parametrize(("name", "task"), [("words-mixlora", "count"), ("words-tokenwise", "reverse")])
def test_tokens_sent_to_the_wrong_experts_get_wrong_answers(name: str, task: str, tokenizer: Any) -> None:
    model = bare_model()
    load_mixture(model, assets.kind_adapters()[name])
    with torch.no_grad():
        for router in routers(model):
            router.weight.neg_()
    inputs = unseen_inputs(task_named(task), 20)
    answers = greedy_answers(model, tokenizer, prompts(tokenizer, name, task_named(task), inputs))
    assert exact_match(task_named(task), inputs, answers) < 0.75


def test_the_magnitudes_of_the_dora_adapter_were_trained() -> None:
    model = peft.PeftModel.from_pretrained(bare_model(), assets.kind_adapters()["reverse-dora"])
    gains = []
    for part in model.modules():
        if isinstance(part, peft.tuners.lora.Linear):
            (magnitude,) = part.lora_magnitude_vector.values()
            changed = part.base_layer.weight + part.get_delta_weight("default")
            gains.append(magnitude.weight / changed.norm(dim=1))
    assert len(gains) == 35
    assert all((gain - 1).abs().max() > 0.01 for gain in gains)
