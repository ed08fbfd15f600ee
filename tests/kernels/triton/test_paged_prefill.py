"""The prefill kernel against the plain form in float64, with every key that it must not see NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

LENGTHS, ROWS = (1, 17, 130, 65), (1, 17, 40, 1)


@pytest.mark.parametrize(
    ("page_tokens", "dtype"),
    [(8, torch.float32), (16, torch.float32), (32, torch.bfloat16), (16, torch.bfloat16), (8, torch.float16)],
    ids=str,
)
def test_prompts_chunks_and_single_tokens_match_the_reference(
    make_paged: Any, assert_near: Any, page_tokens: int, dtype: torch.dtype
) -> None:
    paged = make_paged(LENGTHS, page_tokens=page_tokens, dtype=dtype)
    q = paged.queries(sum(ROWS))
    assert_near(paged.prefill(q, ROWS), paged.prefill(q, ROWS, exact=True))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_every_size_match_the_reference(
    make_paged: Any, assert_near: Any, head_dim: int, dtype: torch.dtype
) -> None:
    paged = make_paged((70,), head_dim=head_dim, dtype=dtype)
    q = paged.queries(20)
    assert_near(paged.prefill(q, (20,)), paged.prefill(q, (20,), exact=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (14, 2), (8, 1), (20, 1), (40, 1)])
def test_groups_of_every_size_match_the_reference(make_paged: Any, assert_near: Any, heads: int, kv_heads: int) -> None:
    paged = make_paged((40,), heads=heads, kv_heads=kv_heads)
    q = paged.queries(12)
    assert_near(paged.prefill(q, (12,)), paged.prefill(q, (12,), exact=True))


@pytest.mark.parametrize("window", [1, 7, 16, 64, 100, 1000])
def test_a_window_reads_nothing_that_lies_before_it(make_paged: Any, assert_near: Any, window: int) -> None:
    hidden = [max(0, n - rows - window + 1) for n, rows in zip(LENGTHS, ROWS)]
    paged = make_paged(LENGTHS, hidden=hidden)
    q = paged.queries(sum(ROWS))
    assert_near(paged.prefill(q, ROWS, window), paged.prefill(q, ROWS, window, exact=True))


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("ordered_dots")
def test_a_sequence_is_bit_identical_alone_and_among_any_neighbours(
    make_paged: Any, dtype: torch.dtype, window: int
) -> None:
    paged = make_paged(LENGTHS, dtype=dtype)
    q = paged.queries(sum(ROWS))
    together, start = paged.prefill(q, ROWS, window), 0
    for i, (n, rows) in enumerate(zip(LENGTHS, ROWS)):
        alone = make_paged((n,), dtype=dtype)
        alone.pages, alone.table = paged.pages, paged.table[i : i + 1]
        own = alone.prefill(q[start : start + rows], (rows,), window)
        assert torch.equal(own, together[start : start + rows])
        start += rows


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("ordered_dots")
def test_a_prompt_is_bit_identical_however_it_is_cut_into_chunks(
    make_paged: Any, dtype: torch.dtype, window: int
) -> None:
    whole = make_paged((150,), dtype=dtype)
    q = whole.queries(150)
    expected = whole.prefill(q, (150,), window)
    for start, stop in ((0, 37), (37, 101), (101, 102), (102, 150)):
        part = make_paged((stop,), dtype=dtype)
        part.pages, part.table = whole.pages, whole.table
        assert torch.equal(part.prefill(q[start:stop], (stop - start,), window), expected[start:stop])


def test_an_empty_batch_is_nothing(make_paged: Any) -> None:
    paged = make_paged(())
    assert paged.prefill(paged.queries(0), ()).shape == (0, 2, 64)


def test_a_sequence_without_new_tokens_takes_no_tile(make_paged: Any, assert_near: Any) -> None:
    paged = make_paged((20, 30, 5))
    q = paged.queries(11)
    assert_near(paged.prefill(q, (6, 0, 5)), paged.prefill(q, (6, 0, 5), exact=True))


def test_tiles_cover_every_new_token_once_and_the_longest_come_first(kernels: SimpleNamespace) -> None:
    rows, lengths = np.array([5, 0, 33, 16], dtype=np.int32), np.array([500, 9, 33, 20], dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
    tiles = kernels.prefill.prefill_tiles(starts, lengths, 16)
    assert tiles.dtype == np.int32
    assert sorted(tiles.tolist()) == [[0, 0], [2, 0], [2, 16], [2, 32], [3, 0]]
    keys = (lengths - rows)[tiles[:, 0]] + tiles[:, 1]
    assert (np.diff(keys) <= 0).all()
