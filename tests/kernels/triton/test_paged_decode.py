"""The decode kernel against the plain form in float64, with every key that it must not see NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(
    ("page_tokens", "dtype"),
    [(8, torch.float32), (16, torch.float32), (32, torch.bfloat16), (16, torch.bfloat16), (8, torch.float16)],
    ids=str,
)
def test_rows_of_many_lengths_match_the_reference(
    make_paged: Any, assert_near: Any, page_tokens: int, dtype: torch.dtype
) -> None:
    lengths = (1, page_tokens - 1, page_tokens, page_tokens + 1, 128, 129, 270)
    paged = make_paged(lengths, page_tokens=page_tokens, dtype=dtype)
    q = paged.queries(len(lengths))
    assert_near(paged.decode(q), paged.decode(q, exact=True))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_every_size_match_the_reference(
    make_paged: Any, assert_near: Any, head_dim: int, dtype: torch.dtype
) -> None:
    paged = make_paged((70,), head_dim=head_dim, dtype=dtype)
    q = paged.queries(1)
    assert_near(paged.decode(q), paged.decode(q, exact=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (14, 2), (8, 1), (20, 1)])
def test_groups_of_every_size_match_the_reference(make_paged: Any, assert_near: Any, heads: int, kv_heads: int) -> None:
    paged = make_paged((33, 70), heads=heads, kv_heads=kv_heads)
    q = paged.queries(2)
    assert_near(paged.decode(q), paged.decode(q, exact=True))


@pytest.mark.parametrize("window", [1, 7, 16, 64, 150, 1000])
def test_a_window_reads_nothing_that_lies_before_it(make_paged: Any, assert_near: Any, window: int) -> None:
    lengths = (1, 65, 330)
    paged = make_paged(lengths, hidden=[max(0, n - window) for n in lengths])
    q = paged.queries(len(lengths))
    assert_near(paged.decode(q, window), paged.decode(q, window, exact=True))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("ordered_dots")
def test_a_row_is_bit_identical_alone_and_among_any_neighbours(
    make_paged: Any, kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int
) -> None:
    monkeypatch.setattr(kernels.decode, "MAX_SPLITS", 2)  # so that the sizes of splits differ between these rows
    lengths = (300, 1, 129, 64)
    paged = make_paged(lengths, dtype=dtype)
    q = paged.queries(len(lengths))
    together = paged.decode(q, window)
    for i, n in enumerate(lengths):
        alone = make_paged((n,), dtype=dtype, seed=5)
        alone.pages, alone.table = paged.pages, paged.table[i : i + 1]
        assert torch.equal(alone.decode(q[i : i + 1], window)[0], together[i])
    turned = make_paged(lengths[::-1], dtype=dtype)
    turned.pages, turned.table = paged.pages, paged.table.flip(0)
    assert torch.equal(turned.decode(q.flip(0), window).flip(0), together)


def test_splits_of_a_long_row_are_longer_instead_of_more(
    make_paged: Any, assert_near: Any, kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.decode, "MAX_SPLITS", 2)
    paged = make_paged((700, 20, 256), heads=2, kv_heads=1)
    assert kernels.decode.count_splits(np.array(paged.lengths, dtype=np.int32), 0).tolist() == [2, 1, 2]
    q = paged.queries(3)
    assert_near(paged.decode(q), paged.decode(q, exact=True))


def test_room_for_more_tiles_than_there_are_changes_nothing(make_paged: Any) -> None:
    paged = make_paged((130, 3))
    q = paged.queries(2)
    assert torch.equal(paged.decode(q, capacity=40), paged.decode(q))


def test_a_row_without_keys_is_zero(make_paged: Any) -> None:
    paged = make_paged((0, 9))
    out = paged.decode(paged.queries(2))
    assert not out[0].any()
    assert out[1].all()


def test_an_empty_batch_is_nothing(make_paged: Any) -> None:
    paged = make_paged(())
    assert paged.decode(paged.queries(0)).shape == (0, 2, 64)


def test_tiles_cover_each_row_once_and_in_order(kernels: SimpleNamespace) -> None:
    lengths = np.array([1, 128, 129, 0, 5000], dtype=np.int32)
    tiles, starts = kernels.decode.list_decode_tiles(kernels.decode.count_splits(lengths, 0))
    assert np.diff(starts).tolist() == [1, 1, 2, 1, 20]
    assert tiles.tolist() == [[row, split] for row in range(5) for split in range(starts[row + 1] - starts[row])]


@pytest.mark.parametrize("window", [0, 1, 130, 4096])
def test_splits_are_few_and_follow_the_keys_in_sight(kernels: SimpleNamespace, window: int) -> None:
    lengths = np.arange(0, 200_000, 37, dtype=np.int32)
    splits = kernels.decode.count_splits(lengths, window)
    assert splits.min() == 1
    assert splits.max() <= kernels.decode.MAX_SPLITS
    if window:
        assert splits.max() <= window // kernels.decode.SPLIT_KEYS + 2
