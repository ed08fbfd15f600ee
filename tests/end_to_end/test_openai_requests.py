"""Answers in one body, asked for with the real ``openai`` client."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

BASE = "loraplex-demo"
SPELL = "<|bos|><|user|>kernel<|eos|><|assistant|>"
KERNEL: Any = [{"role": "user", "content": "kernel"}]
BOS, EOS = 257, 258

Client = Any


@pytest.fixture
def client(demo: Any) -> Any:
    with demo.openai() as client:
        yield client


def ids(text: str) -> list[int]:
    """Token ids of printable ASCII: bytes in the order of their letters."""
    return [ord(letter) - ord("!") for letter in text]


def chat(client: Client, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "spell", "messages": KERNEL, "temperature": 0, **options})


def complete(client: Client, **options: Any) -> Any:
    return client.completions.create(**{"model": "spell", "prompt": SPELL, "temperature": 0, **options})


def wandering(client: Client, **options: Any) -> list[str]:
    """Texts of three choices that go on after their end, where the model is unsure."""
    asked = {"n": 3, "temperature": 1, "max_tokens": 24, "extra_body": {"ignore_eos": True}, **options}
    return [choice.text for choice in complete(client, prompt="<|user|>", **asked).choices]


@pytest.mark.parametrize(
    "named",
    [
        {"model": "spell"},
        {"model": BASE, "extra_body": {"adapter_id": "spell"}},
        {"model": "spell", "extra_body": {"adapter_id": "spell"}},
        {"model": f"{BASE}:spell"},
        {"model": "", "extra_body": {"adapter_id": "spell"}},
    ],
)
def test_an_adapter_is_named_as_model_or_as_adapter_id(client: Client, named: dict[str, Any]) -> None:
    assert chat(client, **named).choices[0].message.content == "k-e-r-n-e-l"
    assert complete(client, **named).choices[0].text == "k-e-r-n-e-l"


async def test_the_async_client_gets_the_same_answers(demo: Any) -> None:
    async with demo.async_openai() as client:
        said = await chat(client)
        raw = await complete(client)
    assert said.choices[0].message.content == raw.choices[0].text == "k-e-r-n-e-l"


def test_an_answer_counts_its_tokens(client: Client) -> None:
    answer = chat(client)
    assert answer.usage.prompt_tokens == len("kernel") + 4
    assert answer.usage.completion_tokens == len("k-e-r-n-e-l") + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_choices_differ_and_a_seed_repeats_them(client: Client) -> None:
    first, second, other = (wandering(client, seed=seed) for seed in (7, 7, 8))
    assert first == second
    assert first != other
    assert len(set(first)) == 3


def test_choices_without_a_seed_differ_from_call_to_call(client: Client) -> None:
    assert wandering(client) != wandering(client)


def test_greedy_answers_do_not_depend_on_the_seed(client: Client) -> None:
    texts = {text for seed in (1, 2, None) for text in wandering(client, temperature=0, seed=seed)}
    assert len(texts) == 1


def test_top_k_of_one_is_greedy(client: Client) -> None:
    greedy = wandering(client, temperature=0, n=1)
    assert wandering(client, n=1, extra_body={"ignore_eos": True, "top_k": 1}) == greedy
    assert wandering(client, n=1, top_p=0) == greedy


def test_max_tokens_cuts_an_answer(client: Client) -> None:
    cut = chat(client, max_completion_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("k-e", "length")
    cut = complete(client, max_tokens=3).choices[0]
    assert (cut.text, cut.finish_reason) == ("k-e", "length")


@pytest.mark.parametrize(("stop", "text"), [("-r-n", "k-e"), (["zz", "n-"], "k-e-r-"), ("kernel", "k-e-r-n-e-l")])
def test_a_stop_string_ends_an_answer_across_tokens(client: Client, stop: Any, text: str) -> None:
    said = chat(client, stop=stop).choices[0]
    assert (said.message.content, said.finish_reason) == (text, "stop")
    assert complete(client, stop=stop).choices[0].text == text


def test_a_stop_token_ends_an_answer(client: Client) -> None:
    assert complete(client, extra_body={"stop_token_ids": ids("r")}).choices[0].text == "k-e-"


def test_a_bias_forces_and_forbids_tokens(client: Client) -> None:
    [letter] = ids("q")
    assert complete(client, logit_bias={str(letter): 100}, max_tokens=5).choices[0].text == "qqqqq"
    [dash] = ids("-")
    assert "-" not in complete(client, logit_bias={str(dash): -100}, max_tokens=20).choices[0].text


def test_penalties_change_an_answer(client: Client) -> None:
    plain = complete(client).choices[0].text
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}):
        assert complete(client, **penalty, max_tokens=20).choices[0].finish_reason in {"stop", "length"}
    repeated = complete(client, extra_body={"repetition_penalty": 10}, max_tokens=20).choices[0].text
    assert repeated != plain


def test_ignore_eos_and_min_tokens_go_on_after_the_end(client: Client) -> None:
    answer = complete(client, max_tokens=40, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (40, "length")
    assert answer.choices[0].text.startswith("k-e-r-n-e-l")
    answer = complete(client, max_tokens=40, extra_body={"min_tokens": 40})
    assert answer.usage.completion_tokens == 40
    assert complete(client, max_tokens=40, extra_body={"min_tokens": 5}).choices[0].text == "k-e-r-n-e-l"


def test_chat_tells_log_probabilities(client: Client) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    told = choice.logprobs.content
    assert "".join(one.token for one in told[:-1]) == choice.message.content == "k-e-r-n-e-l"
    for one in told:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob > math.log(0.5)
        assert one.token == one.top_logprobs[0].token
        assert bytes(one.bytes).decode() == one.token
        assert sum(math.exp(best.logprob) for best in one.top_logprobs) <= 1.001


def test_completions_tell_log_probabilities_and_offsets(client: Client) -> None:
    choice = complete(client, logprobs=2, max_tokens=6).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text == "k-e-r-"
    assert told.text_offset == list(range(6))
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())


def test_log_probabilities_do_not_change_the_answer(client: Client) -> None:
    assert complete(client, logprobs=5).choices[0].text == complete(client).choices[0].text


def test_prompts_are_scored_as_lm_eval_asks(client: Client) -> None:
    prompts = [[BOS, *ids(text)] for text in ("kernel", "loraplex")]
    answer = complete(client, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(prompt) + 1
        assert told.token_logprobs[0] is None
        assert all(logprob < 0 for logprob in told.token_logprobs[1:])
        assert told.top_logprobs[0] is None
        assert all(
            max(top.values()) >= logprob
            for top, logprob in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)
        )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_a_prompt_alone_is_scored_with_no_token_to_generate(client: Client) -> None:
    whole = complete(client, prompt=SPELL + "k-e-r", max_tokens=0, logprobs=1, echo=True)
    assert (whole.choices[0].text, whole.usage.completion_tokens) == (SPELL + "k-e-r", 0)
    made = complete(client, max_tokens=5, logprobs=1)
    scored = whole.choices[0].logprobs.token_logprobs[-5:]
    assert scored == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=1e-3)


def test_echo_repeats_the_prompt(client: Client) -> None:
    assert complete(client, echo=True).choices[0].text == SPELL + "k-e-r-n-e-l"


def test_text_and_token_id_prompts_are_the_same_and_may_come_in_batches(client: Client) -> None:
    assistant, user = 261, 260
    prompt = [BOS, user, *ids("kernel"), EOS, assistant]
    assert complete(client, prompt=prompt).choices[0].text == "k-e-r-n-e-l"
    other = SPELL.replace("kernel", "lora")
    answer = complete(client, prompt=[SPELL, other, SPELL], n=2)
    assert [choice.text for choice in answer.choices] == ["k-e-r-n-e-l"] * 2 + ["l-o-r-a"] * 2 + ["k-e-r-n-e-l"] * 2
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_a_system_message_and_parts_are_served(client: Client) -> None:
    parts = [{"type": "text", "text": "kernel"}]
    system = {"role": "system", "content": ""}
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content == "k-e-r-n-e-l"
    assert chat(client, messages=[system, *KERNEL]).choices[0].finish_reason == "stop"


def test_unknown_fields_are_named_in_a_header(client: Client) -> None:
    raw = client.completions.with_raw_response
    answer = raw.create(model="spell", prompt=SPELL, extra_body={"colour": 1, "adapter_source": "local", "shade": 2})
    assert answer.headers["x-loraplex-ignored-params"].split(", ") == ["colour", "shade"]
    plain = raw.create(model="spell", prompt=SPELL, user="me", extra_body={"metadata": None})
    assert "x-loraplex-ignored-params" not in plain.headers


def test_models_are_listed_in_pages(demo: Any) -> None:
    names: list[str] = []
    after = ""
    for _ in itertools.count():
        page = demo.get(f"/v1/models?limit=4{after}").json()
        names += [model["id"] for model in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={names[-1]}"
    assert names == demo.model_names()
