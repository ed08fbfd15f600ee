"""Sampling against plain formulas, row by row."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from loraplex.server.messages import Generate, SamplingParams
from loraplex.server.request import Sequence, choice_seed, make_request
from loraplex.server.sampler import choose_tokens, log_probabilities, sample, sample_batch, token_logprobs
from loraplex.server.sampling_batch import SamplingBatch

Floats = npt.NDArray[np.float64]
EOS = 5


def sequence_of(
    prompt: SequenceOf[int] = (1, 2), outputs: SequenceOf[int] = (), index: int = 0, **params: Any
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 100, **params})
    generate = Generate(request_id="r", prompt_ids=list(prompt), params=sampling, n=index + 1)
    request = make_request(generate, first_seq_id=0, arrival=0.0, max_total_tokens=1000, eos_token_ids=frozenset({EOS}))
    for token in outputs:
        request.sequences[index].append(token)
    return request.sequences[index]


def draw(logits: SequenceOf[float], sequences: SequenceOf[Sequence]) -> list[int]:
    rows = torch.tensor([list(logits)]).repeat(len(sequences), 1)
    return [token.token_id for token in sample(rows, sequences)]


def draw_evenly(logits: SequenceOf[float], monkeypatch: pytest.MonkeyPatch, count: int = 2000, **params: Any) -> Floats:
    """Shares of the tokens when the uniform numbers are spread evenly over [0, 1)."""
    evenly = iter((i + 0.5) / count for i in range(count))
    monkeypatch.setattr("loraplex.server.sampling_batch._uniform", lambda *_: next(evenly))
    tokens = draw(logits, [sequence_of(seed=0, **params)] * count)
    return np.bincount(tokens, minlength=len(logits)) / count


def expected_shares(
    logits: SequenceOf[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Floats:
    """The distribution that is drawn from, by the definitions."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    kept = [i for i in order[: top_k or None] if probabilities[i] >= min_p * probabilities.max()]
    total, nucleus = sum(probabilities[kept]), []
    for i in kept:
        if nucleus and sum(probabilities[nucleus]) >= top_p * total:
            break
        nucleus.append(i)
    shares = np.zeros(len(logits))
    shares[nucleus] = probabilities[nucleus] / sum(probabilities[nucleus])
    return shares


LOGITS = [0.3, -1.0, 2.0, 1.1, -3.0, 0.9, 1.7, -0.2]

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.0},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 6, "min_p": 0.2, "top_p": 0.7, "temperature": 1.5},
    {"top_p": 0.95, "min_p": 0.05, "temperature": 0.7},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_shares_are_those_of_the_definition(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_shares(LOGITS, **params)
    found = draw_evenly(LOGITS, monkeypatch, **params)
    np.testing.assert_allclose(found, expected, atol=1.01 / 2000)
    assert not found[expected == 0].any()


@pytest.mark.parametrize("params", [{}, {"top_k": 4, "temperature": 1.3}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_seeded_draws_pass_a_chi_square_test(params: dict[str, Any]) -> None:
    count = 4000
    tokens = draw(LOGITS, [sequence_of(seed=seed, **params) for seed in range(count)])
    expected = count * expected_shares(LOGITS, **params)
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert not observed[expected == 0].any()
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 24.3  # 99.9 % at seven degrees of freedom


def test_successive_draws_of_one_sequence_pass_a_chi_square_test() -> None:
    sequence, count = sequence_of(seed=11), 3000
    for _ in range(count):
        sequence.append(draw(LOGITS, [sequence])[0])
    expected = count * expected_shares(LOGITS)
    observed = np.bincount(sequence.output_ids, minlength=len(LOGITS))
    assert ((observed - expected) ** 2 / expected).sum() < 24.3


def test_temperature_zero_takes_the_best_token_and_the_first_of_equals() -> None:
    assert draw(LOGITS, [sequence_of(temperature=0.0), sequence_of(temperature=0.0, top_k=3, seed=4)]) == [2, 2]
    assert draw([1.0, 3.0, 3.0], [sequence_of(temperature=0.0)]) == [1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-60])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_tiny_temperature_is_as_good_as_zero(temperature: float, top_k: int) -> None:
    sequences = [sequence_of(temperature=temperature, top_k=top_k, seed=seed) for seed in range(20)]
    assert draw(LOGITS, sequences) == [2] * 20
    assert draw([-40.0, -900.0, -30.0], sequences) == [2] * 20


def test_seeds_reproduce_draws_and_differ_from_each_other() -> None:
    flat = [0.0] * 1000
    again = [draw(flat, [sequence_of(seed=seed) for seed in range(50)]) for _ in range(2)]
    assert again[0] == again[1]
    assert len(set(again[0])) > 40
    assert draw(flat, [sequence_of(seed=2**63 - 1)]) != draw(flat, [sequence_of(seed=2**63 - 2)])


def test_choices_and_positions_draw_different_numbers() -> None:
    flat = [0.0] * 1000
    assert len(set(draw(flat, [sequence_of(seed=3, index=index) for index in range(8)]))) == 8
    assert len(set(draw(flat, [sequence_of(seed=3, outputs=[7] * n) for n in range(8)]))) == 8
    assert sequence_of(seed=3, index=2).seed == choice_seed(3, 2)


def test_without_a_seed_draws_differ() -> None:
    assert len(set(draw([0.0] * 1000, [sequence_of() for _ in range(20)]))) > 10


KINDS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"temperature": 0.0},
    {"seed": 3, "top_k": 5, "logprobs": 3},
    {"seed": 4, "presence_penalty": 1.0, "outputs": [3, 3, 4]},
    {"seed": 5, "logit_bias": {2: 5.0}, "logprobs": 0},
    {"seed": 6, "min_p": 0.1, "repetition_penalty": 1.5},
    {"seed": 7, "min_tokens": 3},
]


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(len(KINDS), 50) * 2
    make = [sequence_of(**kind) for kind in KINDS]
    together = sample(logits.clone(), make)
    alone = [sample(logits[i : i + 1].clone(), [sequence])[0] for i, sequence in enumerate(make)]
    reverse = sample(logits.flip(0).clone(), make[::-1])[::-1]
    assert [t.token_id for t in together] == [t.token_id for t in alone] == [t.token_id for t in reverse]
    assert together == reverse


def adjusted(logits: SequenceOf[float], sequence: Sequence) -> list[float]:
    """Logits after penalties and biases: those are changed in place."""
    rows = torch.tensor([list(logits)])
    sample(rows, [sequence])
    found: list[float] = rows[0].tolist()
    return found


def test_presence_and_frequency_penalties_count_sampled_tokens_alone() -> None:
    sequence = sequence_of(
        prompt=[0, 0, 1], outputs=[2, 2, 2, 3], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    assert adjusted([1.0] * 5, sequence) == pytest.approx([1, 1, 1 - 0.5 - 0.75, 1 - 0.5 - 0.25, 1])
    negative = sequence_of(outputs=[2, 2], temperature=0.0, presence_penalty=-1.0, frequency_penalty=-0.5)
    assert adjusted([1.0] * 4, negative) == pytest.approx([1, 1, 3, 1])


def test_repetition_penalty_weakens_prompt_and_sampled_tokens() -> None:
    sequence = sequence_of(prompt=[0, 1, 0], outputs=[3], temperature=0.0, repetition_penalty=2.0)
    assert adjusted([3.0, -3.0, 3.0, -1.0, -1.0], sequence) == pytest.approx([1.5, -6, 3, -2, -1])


def test_penalties_and_biases_add_up() -> None:
    sequence = sequence_of(
        prompt=[1],
        outputs=[2],
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        logit_bias={2: 3.0, 0: -1.0},
    )
    assert adjusted([1.0, 1.0, 4.0], sequence) == pytest.approx([0.0, 0.5, 2.0 - 0.5 + 3.0])


def test_extreme_biases_force_and_forbid_tokens() -> None:
    sequences = [sequence_of(seed=seed, logit_bias={4: 100.0}) for seed in range(200)]
    assert draw(LOGITS, sequences) == [4] * 200
    sequences = [sequence_of(seed=seed, logit_bias={2: -100.0, 6: -100.0}) for seed in range(300)]
    assert not {2, 6} & set(draw(LOGITS, sequences))


@pytest.mark.parametrize("stops", [(EOS,), (EOS, 2), (EOS, 2, 999)], ids=str)
def test_min_tokens_suppresses_every_stop_until_it_is_reached(stops: tuple[int, ...]) -> None:
    logits = [0.0, 0.0, 50.0, 0.0, 0.0, 60.0]
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": stops[1:]}
    for outputs in ([], [1]):
        assert draw(logits, [sequence_of(outputs=outputs, **params)])[0] not in stops
        seeded = [sequence_of(outputs=outputs, **{**params, "temperature": 1.0, "seed": s}) for s in range(50)]
        assert not set(draw(logits, seeded)) & set(stops)
        biased = {**params, "logit_bias": {EOS: 100.0}}
        assert draw(logits, [sequence_of(outputs=outputs, **biased)])[0] not in stops
    assert draw(logits, [sequence_of(outputs=[1, 1], **params)]) == [EOS]


def test_ignored_ends_are_sampled_like_any_token() -> None:
    assert draw([0.0] * 5 + [9.0], [sequence_of(temperature=0.0, min_tokens=3, ignore_eos=True)]) == [EOS]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53, 0.5])
@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_a_token_of_probability_zero_is_never_drawn(
    uniform: float, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.server.sampling_batch._uniform", lambda *_: uniform)
    forbidden = float("-inf")
    for logits in ([forbidden, *LOGITS, forbidden], [200.0, *LOGITS, forbidden], [forbidden, 1.0, forbidden]):
        (token,) = draw(logits, [sequence_of(seed=0, **params)])
        assert expected_shares(logits, **params)[token] > 0


@pytest.mark.parametrize("params", [{"temperature": 0.0}, *FILTERS], ids=str)
def test_a_step_survives_logits_that_forbid_everything(params: dict[str, Any]) -> None:
    (token,) = draw([float("-inf")] * 4, [sequence_of(seed=0, **params)])
    assert 0 <= token < 4


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}], ids=str)
def test_large_vocabularies_are_sampled_to_the_last_token(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.server.sampling_batch._uniform", lambda *_: 1 - 2.0**-53)
    size = 150_000
    (token,) = draw([0.0] * size, [sequence_of(seed=0, **params)])
    assert token == (size if not params else round(0.9 * size)) - 1


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    sequence = sequence_of(
        outputs=[2], seed=1, logprobs=4, temperature=0.2, top_k=2, logit_bias={0: 100.0}, presence_penalty=2.0
    )
    (found,) = sample(torch.tensor([LOGITS]), [sequence])
    assert found.token_id == 0
    own = np.log(expected_shares(LOGITS))
    assert found.logprob is not None
    assert found.logprob.token_id == 0
    assert found.logprob.logprob == pytest.approx(own[0], abs=1e-5)
    assert [token for token, _ in found.logprob.top] == [2, 6, 3, 5]
    assert [value for _, value in found.logprob.top] == pytest.approx(sorted(own)[::-1][:4], abs=1e-5)


def test_each_row_gets_as_many_logprobs_as_it_asks_for() -> None:
    wanted = [None, 0, 3, 100, None, 1]
    sequences = [sequence_of(seed=0, logprobs=count) for count in wanted]
    found = sample(torch.tensor([LOGITS] * len(wanted)), sequences)
    assert [t.logprob is None for t in found] == [count is None for count in wanted]
    assert [len(t.logprob.top) for t in found if t.logprob] == [0, 3, len(LOGITS), 1]


def test_given_tokens_get_their_logprobs() -> None:
    logprobs = torch.tensor([LOGITS, LOGITS[::-1]]).log_softmax(-1)
    found = token_logprobs(logprobs, [4, 4], [0, 2])
    assert [entry.logprob for entry in found] == [logprobs[0, 4].item(), logprobs[1, 4].item()]
    assert found[0].top == []
    assert [token for token, _ in found[1].top] == [5, 1]


def test_tokens_are_chosen_first_and_read_later() -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(KINDS), 50) * 2
    sequences = [sequence_of(**kind) for kind in KINDS]
    batch = SamplingBatch.of(sequences, 50)
    tokens = choose_tokens(logits.clone(), batch)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (len(KINDS),))
    expected = sample(logits.clone(), sequences)
    assert tokens.tolist() == [token.token_id for token in expected]
    assert sample_batch(logits.clone(), batch).to_host().read() == expected


def test_a_batch_of_greedy_rows_has_nothing_but_its_size() -> None:
    batch = SamplingBatch.of([sequence_of(temperature=0.0, seed=3, top_p=0.5)] * 3, 50)
    assert (batch.num_rows, batch.arrays, len(batch.logprob_rows)) == (3, {}, 0)


def test_a_pending_token_counts_as_sampled() -> None:
    for params in ({"seed": 3}, {"temperature": 0.0, "min_tokens": 2}):
        known, pending = sequence_of(outputs=[7, 7], **params), sequence_of(outputs=[7], **params)
        pending.expect()
        logits = torch.zeros(1, 1000)
        logits[:, EOS] = 1.0
        batches = [SamplingBatch.of([sequence], 1000) for sequence in (known, pending)]
        assert batches[0].arrays == batches[1].arrays
        assert len({choose_tokens(logits.clone(), batch).item() for batch in batches}) == 1


@pytest.fixture
def sums_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose sums of rows depend on what lies beside them."""
    monkeypatch.setattr("loraplex.server.sampler._sums_in_order", lambda _: False)


@pytest.mark.usefixtures("sums_in_any_order")
@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_sums_in_whole_numbers_give_the_same_shares(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_shares(LOGITS, **params)
    found = draw_evenly(LOGITS, monkeypatch, **params)
    np.testing.assert_allclose(found, expected, atol=1.01 / 2000)
    assert not found[expected == 0].any()


@pytest.mark.usefixtures("sums_in_any_order")
def test_sums_in_whole_numbers_survive_the_same_edges() -> None:
    for params in ({}, {"top_p": 0.9}, {"min_p": 1.0}):
        (token,) = draw([float("-inf")] * 4, [sequence_of(seed=0, **params)])
        assert 0 <= token < 4
        assert draw([float("-inf"), 300.0, -300.0], [sequence_of(seed=0, temperature=1e-30, **params)]) == [1]
    logits = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0)) * 8
    torch.testing.assert_close(log_probabilities(logits), logits.double().log_softmax(-1).float(), atol=2e-6, rtol=1e-6)
    assert log_probabilities(torch.tensor([[0.0, float("-inf")]])).tolist() == [[0.0, float("-inf")]]
