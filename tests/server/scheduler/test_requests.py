from __future__ import annotations

import pytest

from loraplex.server.messages import Generate, SamplingParams
from loraplex.server.request import Sequence, SequenceState, choice_seed, make_request
from loraplex.server.scheduler_config import SchedulerConfig

EOS = 99


def sequence(**params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=5, **params)  # type: ignore[arg-type]
    generate = Generate(request_id="r", prompt_ids=[1, 2, 3], params=sampling)
    eos = frozenset({EOS})
    return make_request(generate, first_seq_id=0, arrival=0.0, max_total_tokens=100, eos_token_ids=eos).sequences[0]


@pytest.mark.parametrize(
    "states",
    [
        [SequenceState.WAITING],
        [SequenceState.RUNNING, SequenceState.RUNNING],
        [SequenceState.FINISHED, SequenceState.RUNNING],
        [SequenceState.FINISHED, SequenceState.FINISHED],
    ],
)
def test_an_illegal_change_of_state_is_a_fault(states: list[SequenceState]) -> None:
    subject = sequence()
    *legal, illegal = states
    for state in legal:
        subject.enter(state)
    with pytest.raises(AssertionError, match=f"sequence 0: {subject.state.value} -> {illegal.value}"):
        subject.enter(illegal)


def test_slices_of_tokens_run_across_prompt_and_output() -> None:
    subject = sequence()
    for token in (4, 5, 6):
        subject.append(token)
    tokens = [1, 2, 3, 4, 5, 6]
    for start in range(7):
        for stop in range(start, 7):
            assert subject.token_slice(start, stop) == tokens[start:stop]


def test_sampled_tokens_are_counted_only_under_a_penalty() -> None:
    plain, counted = sequence(), sequence(presence_penalty=0.5)
    for subject in (plain, counted):
        subject.append(4)
        subject.append(4)
    assert plain.output_counts is None
    assert counted.output_counts == {4: 2}


def test_seeds_of_choices_are_reproducible_and_far_apart() -> None:
    seeds = [choice_seed(seed, index) for seed in (-1, 0, 1, 2**64) for index in range(64)]
    assert seeds[0] == choice_seed(-1, 0)
    assert choice_seed(2**64, 3) == choice_seed(0, 3)
    assert len(set(seeds)) == 3 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sequence().seed != sequence().seed


def test_limits_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="prefill_chunk is at least 1, not 0"):
        SchedulerConfig(max_model_len=8, prefill_chunk=0)
