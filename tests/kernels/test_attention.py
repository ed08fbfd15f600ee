"""Paged attention against the plain reference, in an arena where everything not owned is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels import ops
from loraplex.kernels.attention_plan import AttentionPlan, AttentionPlanner, SequenceSpan
from loraplex.kernels.attention_reference import attention_reference

HEAD_DIM = 16
Ranges = Sequence[tuple[int, int]]


class Arena:
    """One layer of an arena. Pages, and the tail of each sequence's last page, are NaN until tokens are written."""

    def __init__(self, kv_heads: int, page_tokens: int, dtype: torch.dtype, num_pages: int = 64) -> None:
        self.half_pages = torch.full((num_pages * 2, page_tokens, kv_heads, HEAD_DIM), float("nan"), dtype=dtype)
        self.page_tokens = page_tokens
        self._free: list[int] = np.random.default_rng(1).permutation(num_pages).tolist()

    def spans(self, ranges: Ranges) -> list[SequenceSpan]:
        """Sequences with new tokens [start, stop); the tokens before them are written already."""
        spans, row = [], 0
        for start, stop in ranges:
            count = -(-stop // self.page_tokens)
            pages, self._free = self._free[:count], self._free[count:]
            spans.append(SequenceSpan(row, start, stop, pages))
            row += stop - start
            if start:
                self.write([SequenceSpan(0, 0, start, pages)])
        return spans

    def write(self, spans: Sequence[SequenceSpan]) -> None:
        plan = self.plan(spans, (None,))
        slots = self.half_pages.view(-1, self.half_pages[0, 0].numel())
        k, v = (torch.randn(len(plan.positions), slots.shape[1]).to(slots.dtype) for _ in range(2))
        ops.write_kv(slots, k, v, plan.k_slots, plan.v_slots)

    def plan(self, spans: Sequence[SequenceSpan], windows: tuple[int | None, ...]) -> AttentionPlan:
        planner = AttentionPlanner(self.page_tokens, windows, self.half_pages.dtype, torch.device("cpu"))
        return planner.plan(spans)


def attend(q: torch.Tensor, half_pages: torch.Tensor, plan: AttentionPlan, window: int | None) -> torch.Tensor:
    """[rows, heads, head_dim], as the decoder does it."""
    out = torch.full_like(q, float("nan"))
    grouped = q.view(len(q), half_pages.shape[2], -1, HEAD_DIM)
    result = out.view(grouped.shape)
    for bucket in plan.buckets:
        queries, mask = grouped[bucket.rows], bucket.masks[window]
        result[bucket.rows] = ops.decode_attention(
            queries, half_pages, bucket.k_pages, bucket.v_pages, bucket.unused, mask
        )
    for span in plan.prefills:
        queries, mask = grouped[span.start : span.stop].permute(2, 1, 0, 3), span.masks[window]
        attended = ops.prefill_attention(queries, half_pages, span.k_pages, span.v_pages, span.num_keys, mask)
        result[span.start : span.stop] = attended.permute(2, 1, 0, 3)
    return out


def check(
    assert_close: Any,
    ranges: Ranges,
    *,
    group: int = 2,
    kv_heads: int = 2,
    page_tokens: int = 16,
    windows: tuple[int | None, ...] = (None,),
    dtype: torch.dtype = torch.float32,
) -> None:
    torch.manual_seed(0)
    arena = Arena(kv_heads, page_tokens, dtype)
    spans = arena.spans(ranges)
    arena.write(spans)
    plan = arena.plan(spans, windows)
    q = torch.randn(len(plan.positions), kv_heads * group, HEAD_DIM).to(dtype)
    for window in windows:
        expected = attention_reference(q, arena.half_pages, spans, window)
        assert_close(attend(q, arena.half_pages, plan, window), expected)


LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 7])
def test_decoding_sequences_of_many_lengths_match_the_reference(
    assert_close: Any, group: int, dtype: torch.dtype
) -> None:
    check(assert_close, [(n - 1, n) for n in LENGTHS], group=group, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 7])
def test_prompts_of_many_lengths_match_the_reference(assert_close: Any, group: int, dtype: torch.dtype) -> None:
    check(assert_close, [(0, n) for n in (2, 5, 16, 17, 33, 70)], group=group, dtype=dtype)


@pytest.mark.parametrize("page_tokens", [1, 8, 16, 32])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_mixes_of_prompts_chunks_and_decoding_match_the_reference(
    assert_close: Any, page_tokens: int, kv_heads: int
) -> None:
    pages = 64 // (32 // page_tokens) if page_tokens < 32 else 64
    ranges = [(0, 3), (5, 6), (8, 24), (0, 1), (13, 14)] if pages < 16 else [(16, 33), (44, 45), (0, 9), (5, 6), (0, 1)]
    check(assert_close, ranges, page_tokens=page_tokens, kv_heads=kv_heads)


@pytest.mark.parametrize("page_tokens", [8, 16])
def test_windows_hide_what_lies_further_back(assert_close: Any, page_tokens: int) -> None:
    ranges = [(0, 20), (30, 31), (6, 7), (7, 8), (12, 40), (0, 1), (16, 17)]
    check(assert_close, ranges, page_tokens=page_tokens, windows=(None, 1, 7, 8, 16, 100))


def test_a_window_sees_nothing_of_older_keys(assert_close: Any) -> None:
    torch.manual_seed(0)
    arena = Arena(2, 16, torch.float32)
    (span,) = arena.spans([(30, 31)])
    arena.write([span])
    plan, q = arena.plan([span], (4,)), torch.randn(1, 4, HEAD_DIM)
    before = attend(q, arena.half_pages, plan, 4)
    arena.half_pages[2 * span.pages[0] : 2 * span.pages[0] + 2] = 1e6
    assert torch.equal(attend(q, arena.half_pages, plan, 4), before)


def test_each_sequence_of_a_bucket_is_as_if_it_were_alone(rms: Any) -> None:
    torch.manual_seed(0)
    arena = Arena(2, 16, torch.float32)
    spans = arena.spans([(n - 1, n) for n in (3, 60, 18, 35, 1)])
    arena.write(spans)
    q = torch.randn(len(spans), 4, HEAD_DIM)
    together = attend(q, arena.half_pages, arena.plan(spans, (None,)), None)
    for i, span in enumerate(spans):
        own = arena.plan([SequenceSpan(0, span.start, span.stop, span.pages)], (None,))
        assert rms(attend(q[i : i + 1], arena.half_pages, own, None), together[i : i + 1]) <= 1e-6


def test_no_sequence_is_padded_to_more_than_twice_its_pages() -> None:
    arena = Arena(1, 8, torch.float32)
    spans = arena.spans([(n - 1, n) for n in (1, 9, 17, 30, 64, 70, 5)])
    plan = arena.plan(spans, (None,))
    rows = torch.cat([bucket.rows for bucket in plan.buckets])
    assert rows.sort().values.tolist() == list(range(len(spans)))
    for bucket in plan.buckets:
        used = [-(-spans[row].stop // 8) for row in bucket.rows.tolist()]
        assert bucket.k_pages.shape == (len(used), max(used))
        assert max(used) <= 2 * min(used)


def test_keys_and_values_go_to_the_two_halves_of_their_page() -> None:
    arena = Arena(1, 4, torch.float32)
    span = SequenceSpan(0, 3, 6, [9, 2])
    plan = arena.plan([span], (None,))
    assert plan.positions.tolist() == [3, 4, 5]
    assert plan.k_slots.tolist() == [9 * 8 + 3, 2 * 8, 2 * 8 + 1]
    assert plan.v_slots.tolist() == [9 * 8 + 7, 2 * 8 + 4, 2 * 8 + 5]


def test_writing_touches_no_other_slot() -> None:
    arena = Arena(2, 8, torch.float32)
    spans = arena.spans([(6, 11), (0, 1)])
    before = arena.half_pages.clone()
    arena.write(spans)
    changed = (arena.half_pages != before) & ~(arena.half_pages.isnan() & before.isnan())
    assert changed.flatten(2).all(-1).sum() == 2 * 6
    assert changed.sum() == 2 * 6 * 2 * HEAD_DIM
