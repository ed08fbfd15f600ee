"""Prefixes that are computed once: who begins with whose pages, and what gives way to what."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from loraplex.server.adapter_directory import AdapterReady
from loraplex.server.errors import EngineError

Make = Callable[..., Any]

TOKEN = 7
PROMPT = list(range(100, 110))


def cached(rig: Any, prompt: list[int], **options: Any) -> int:
    """Tokens that a new request finds computed; it runs to its end."""
    rig.add("probe", prompt, **{"max_tokens": 1, **options})
    plan = rig.scheduler.schedule()
    start = plan.chunks[-1].start
    assert plan.chunks[-1].sequence.request.request_id == "probe"
    outputs = rig.complete(plan) + rig.drain()
    assert next(output.cached_tokens for output in outputs if output.request_id == "probe") == start
    return int(start)


def test_a_later_request_begins_with_the_full_pages_of_an_earlier_one(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("first", PROMPT, max_tokens=1)
    rig.drain()
    assert rig.kv.prefixes.num_idle_pages == 2
    assert cached(rig, PROMPT) == 8
    assert rig.scheduler.prefix_hit_tokens == 8
    assert cached(rig, [*PROMPT[:7], 0, *PROMPT[8:]]) == 4
    assert cached(rig, [0, *PROMPT[1:]]) == 0


def test_a_conversation_begins_with_the_answer_of_its_last_turn(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("turn 1", PROMPT, max_tokens=8)
    rig.drain()
    # The last token sampled was never computed.
    assert cached(rig, [*PROMPT, *[TOKEN] * 8, 1, 2, 3, 4]) == 16


def test_pages_are_found_while_their_sequence_still_runs(make_rig: Make) -> None:
    rig = make_rig(prefill_chunk=5)
    rig.add("first", PROMPT, max_tokens=20)
    rig.step()
    rig.add("second", PROMPT, max_tokens=1)
    plan = rig.scheduler.schedule()
    assert rig.spans(plan) == [("first", 5, 10), ("second", 4, 9)]
    assert rig.kv.pages(0)[0] == rig.kv.pages(1)[0]


def test_the_last_token_of_a_cached_prompt_is_computed_for_its_logits(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("first", PROMPT[:8], max_tokens=1)
    rig.drain()
    assert cached(rig, PROMPT[:8]) == 4
    assert rig.kv.prefixes.num_pages == 2
    assert cached(rig, PROMPT[:9]) == 8


def test_nothing_is_cached_of_a_step_that_failed(make_rig: Make) -> None:
    rig = make_rig(prefill_chunk=4)
    rig.add("first", PROMPT)
    rig.step()
    rig.scheduler.schedule()
    rig.scheduler.fail_all(EngineError("out of memory"))
    rig.scheduler.check_integrity()
    assert cached(rig, PROMPT) == 4
    rig.kv.prefixes.clear()
    rig.scheduler.check_integrity()
    assert rig.pool.num_free == 64
    assert cached(rig, PROMPT) == 0


def test_nothing_is_cached_of_what_was_aborted_in_the_step(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("first", PROMPT)
    rig.add("other")
    plan = rig.scheduler.schedule()
    rig.scheduler.abort("first")
    rig.complete(plan)
    rig.drain()
    assert cached(rig, PROMPT) == 0


def test_pages_are_never_found_under_another_adapter(make_rig: Make) -> None:
    rig = make_rig()
    askers: list[dict[str, Any]] = [
        {},
        {"adapter": "a"},
        {"adapter": "b"},
        {"mix": {"a": 0.5, "b": 0.5}},
        {"mix": {"a": 0.5, "b": 0.25}},
        {"mix": {"a": 0.5}},
        {"mix": {"a": 1.0, "b": 1.0}},
    ]
    for asker in askers:
        assert cached(rig, PROMPT, **asker) == 0
    for asker in askers:
        assert cached(rig, PROMPT, **asker) == 8
    assert cached(rig, PROMPT, mix={"b": 0.25, "a": 0.5}) == 8
    assert cached(rig, PROMPT, mix={"b": 1.0}) == 8


def test_a_name_that_was_reloaded_with_other_content_finds_nothing(make_rig: Make) -> None:
    rig = make_rig()
    assert cached(rig, PROMPT, adapter="a") == 0
    rig.directory.status["a"] = AdapterReady("other content", 2)
    assert cached(rig, PROMPT, adapter="a") == 0
    rig.directory.status["alias"] = AdapterReady("other content", 2)
    assert cached(rig, PROMPT, adapter="alias") == 8


def test_activated_adapters_share_the_base_prefix_and_nothing_behind_it(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {
        "x": AdapterReady("x", 2, invocation=(50, 51)),
        "y": AdapterReady("y", 2, invocation=(50, 51)),
    }
    prompt = [*PROMPT, 50, 51, 1, 2, 3, 4, 5, 6]
    assert cached(rig, prompt, adapter="x") == 0
    assert cached(rig, prompt, adapter="y") == 8
    assert cached(rig, prompt) == 8
    assert cached(rig, prompt, adapter="a") == 0
    for adapter in ("x", "y", None, "a"):
        assert cached(rig, prompt, adapter=adapter) == 16
    # Not invoked: the base's pages, to the last one.
    base = list(range(200, 210))
    assert cached(rig, base) == 0
    assert cached(rig, base, adapter="x") == 8


def test_equal_tokens_that_an_adapter_acts_on_from_another_place_are_not_the_same(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["x"] = AdapterReady("x", 2, invocation=(TOKEN, TOKEN))
    # The model says TOKEN; of the answer's tokens the later prompt has one more, so that it is invoked later.
    rig.add("first", [1, 2, 3, 4, 5, TOKEN, TOKEN], adapter="x", max_tokens=6)
    rig.drain()
    assert cached(rig, [1, 2, 3, 4, 5, TOKEN, TOKEN, TOKEN, 9], adapter="x") == 4
    assert cached(rig, [1, 2, 3, 4, 5, TOKEN, TOKEN, TOKEN, 9], adapter="x") == 8


def test_one_whose_prompt_is_scored_computes_all_of_it_and_leaves_it_to_others(make_rig: Make) -> None:
    rig = make_rig()
    assert cached(rig, PROMPT) == 0
    assert cached(rig, PROMPT, prompt_logprobs=0) == 0
    other = list(range(200, 210))
    assert cached(rig, other, prompt_logprobs=0) == 0
    assert cached(rig, other) == 8


def test_pages_computed_twice_at_the_same_time_are_kept_once(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("first", PROMPT, max_tokens=3)
    rig.add("second", PROMPT, max_tokens=8)
    rig.step()
    assert rig.kv.pages(0)[:2] == rig.kv.pages(1)[:2]
    assert rig.kv.num_pages == 4
    rig.drain()
    assert rig.kv.prefixes.num_pages == 4
    assert cached(rig, [*PROMPT, *[TOKEN] * 8]) == 16


def test_a_preempted_sequence_finds_its_own_pages_again(make_rig: Make) -> None:
    rig = make_rig(num_pages=8)
    rig.add("old", prompt=4, max_tokens=16)
    rig.add("young", prompt=12, max_tokens=12)
    outputs: list[Any] = []
    starts: list[int] = []
    while rig.scheduler.has_work:
        plan = rig.scheduler.schedule()
        starts += [chunk.start for chunk in plan.chunks if chunk.sequence.seq_id == 1]
        outputs += rig.complete(plan)
    assert rig.scheduler.preemptions == 1
    (back,) = [start for before, start in pairwise(starts) if start < before]
    assert back >= 8
    assert {output.cached_tokens for output in outputs} == {0}
    assert rig.scheduler.prefix_hit_tokens == back


def test_cached_pages_count_as_free_for_others(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("first", PROMPT[:8], max_tokens=1)
    rig.drain()
    assert rig.pool.num_free == 2
    rig.add("large", prompt=15, max_tokens=1)
    assert rig.spans(rig.scheduler.schedule()) == [("large", 0, 15)]


def test_pages_that_a_sequence_begins_with_are_not_counted_as_room_for_it(make_rig: Make) -> None:
    rig = make_rig(num_pages=6)
    rig.add("first", PROMPT[:8], max_tokens=1)
    rig.drain()
    rig.add("running", prompt=8, max_tokens=4)
    rig.step()
    # Free: 1 page; cached: 2. To begin with both it needs 2 more, 1 of them to grow.
    rig.add("second", [*PROMPT[:8], 1, 2, 3], max_tokens=1)
    plan = rig.scheduler.schedule()
    assert [name for name, *_ in rig.spans(plan)] == ["running"]
    rig.complete(plan)
    assert {output.request_id for output in rig.drain()} == {"running", "second"}
    assert rig.scheduler.preemptions == 0


def test_what_a_sequence_begins_with_lets_it_in_where_it_would_not_fit(make_rig: Make) -> None:
    rig = make_rig(num_pages=7)
    rig.add("running", PROMPT, max_tokens=9)
    rig.step()
    rig.step()
    rig.add("alike", [*PROMPT[:8], 1, 2, 3, 4, 5, 6, 7], max_tokens=1)
    rig.add("other", prompt=15, max_tokens=1)
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["running", "alike"]


def test_the_longest_idle_goes_first_be_it_adapter_or_prefix(make_rig: Make) -> None:
    rig = make_rig(num_pages=8)
    rig.add("prefix", PROMPT[:5], max_tokens=1)
    rig.drain()
    rig.add("adapter", [1], adapter="a", max_tokens=1)
    rig.drain()
    rig.add("prefix 2", [2, 3, 4, 5, 6], max_tokens=1)
    rig.drain()
    assert rig.pool.num_free == 4
    rig.add("large", prompt=20, max_tokens=1)
    rig.drain()
    assert rig.adapters.is_resident("a")
    assert cached(rig, [2, 3, 4, 5, 6]) == 4


def test_the_end_of_a_prefix_goes_before_its_beginning(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("first", [*PROMPT, 1, 2], max_tokens=1)
    rig.drain()
    assert rig.kv.prefixes.num_pages == 3
    rig.add("other", prompt=8, max_tokens=1)
    rig.drain()
    assert cached(rig, [*PROMPT, 1, 2, 3]) == 8


@pytest.mark.parametrize("n", [1, 3])
def test_without_prefix_caching_nothing_stays(make_rig: Make, n: int) -> None:
    rig = make_rig(prefix_caching=False)
    rig.add("first", PROMPT, n=n, max_tokens=3)
    rig.drain()
    assert rig.pool.num_free == 64
    rig.add("running", PROMPT, max_tokens=20, n=n)
    rig.step()
    rig.step()
    rig.add("alike", PROMPT, max_tokens=1, n=2)
    plan = rig.scheduler.schedule()
    assert plan.chunks[-1].start == 0
    rig.complete(plan)
    rig.drain()
    assert rig.kv.prefixes.num_pages == 0
