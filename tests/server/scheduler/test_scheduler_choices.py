from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_share_the_prompt_of_the_first(make_rig: Make, prefix_caching: bool) -> None:
    rig = make_rig(prefill_chunk=4, prefix_caching=prefix_caching)
    rig.add("r", prompt=10, n=3, max_tokens=4)
    for _ in range(3):
        plan = rig.scheduler.schedule()
        assert [chunk.sequence.index for chunk in plan.chunks] == [0]
        outputs = rig.complete(plan)
    assert [output.cached_tokens for output in outputs] == [0]
    plan = rig.scheduler.schedule()
    assert [(chunk.sequence.index, chunk.start, chunk.stop) for chunk in plan.chunks] == [
        (0, 10, 11),
        (1, 8, 10),
        (2, 8, 10),
    ]
    assert rig.kv.num_pages == 5
    assert [output.cached_tokens for output in rig.complete(plan)] == [0, 8, 8]
    rig.drain()
    assert rig.num_unused == 64


def test_a_prompt_of_whole_pages_leaves_its_last_token_to_compute(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", prompt=8, n=2)
    rig.step()
    plan = rig.scheduler.schedule()
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(8, 9), (4, 8)]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_compute_the_rest_of_the_prompt_themselves_when_the_first_is_gone(
    make_rig: Make, prefix_caching: bool
) -> None:
    rig = make_rig(prefill_chunk=4, prefix_caching=prefix_caching)
    rig.add("r", prompt=8, n=3)
    rig.step()
    rig.scheduler.abort("r", 0)
    plan = rig.scheduler.schedule()
    start = 4 if prefix_caching else 0
    assert [(chunk.sequence.index, chunk.start) for chunk in plan.chunks] == [(1, start), (2, start)]


def test_choices_wait_for_the_first_while_it_is_preempted(make_rig: Make) -> None:
    rig = make_rig(num_pages=6, prefill_chunk=1)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("r", prompt=15, n=2, max_tokens=2)
    outputs = rig.drain()
    assert rig.scheduler.preemptions == 1
    assert [output.cached_tokens for output in outputs if output.index == 1] == [12, 0]


def test_the_choice_that_is_scored_computes_its_whole_prompt(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", prompt=8, n=2, prompt_logprobs=0, max_tokens=2)
    plan = rig.scheduler.schedule()
    assert [chunk.wants_prompt_logprobs for chunk in plan.chunks] == [True]
    rig.complete(plan)
    plan = rig.scheduler.schedule()
    assert [(c.sequence.index, c.start, c.wants_prompt_logprobs) for c in plan.chunks] == [(0, 8, False), (1, 4, False)]
