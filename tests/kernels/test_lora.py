"""The LoRA operators against the plain reference, over every kind of batch that a step can be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora import add_embedding_lora, add_lora
from loraplex.kernels.lora_plan import AdapterBatch, Segment
from loraplex.kernels.lora_reference import add_embedding_lora_reference, add_lora_reference

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_layers(pool: Any, segments: list[Segment], rows: int, assert_close: Any) -> None:
    """Every group of every layer, and the model sites, of one batch."""
    batch = AdapterBatch(segments, CPU)
    for layer in range(pool.num_layers):
        for group in pool.widths.groups.values():
            y, x = pool.normal(rows, sum(group.out_features)), pool.normal(rows, group.in_features)
            expected = add_lora_reference(y, x, pool.arena, segments, group, layer)
            add_lora(y, x, pool.chunks(layer), batch.layer_plan(layer, group))
            assert_close(y, expected)
    check_model_sites(pool, segments, rows, assert_close)


def check_model_sites(pool: Any, segments: list[Segment], rows: int, assert_close: Any) -> None:
    batch = AdapterBatch(segments, CPU)
    head, embedding = pool.widths.lm_head, pool.widths.embedding
    y, x = pool.normal(rows, pool.widths.vocab), pool.normal(rows, pool.widths.hidden)
    expected = add_lora_reference(y, x, pool.arena, segments, head, None)
    add_lora(y, x, pool.chunks(None), batch.model_plan(head))
    assert_close(y, expected)

    tokens, y = pool.tokens(rows), pool.normal(rows, pool.widths.hidden)
    expected = add_embedding_lora_reference(y, torch.from_numpy(tokens), pool.arena, segments, embedding)
    add_embedding_lora(y, pool.chunks(None), batch.embedding_plan(embedding, tokens))
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "kv", "ffn"), [(64, 100, 128), (100, 64, 300), (128, 128, 256), (200, 8, 130), (256, 100, 64)]
)
def test_mixed_ranks_and_lengths_match_the_reference(
    make_pool: Any,
    make_widths: Any,
    make_segments: Any,
    assert_close: Any,
    dtype: torch.dtype,
    hidden: int,
    kv: int,
    ffn: int,
) -> None:
    pool = make_pool(make_widths(hidden, kv, ffn), dtype, num_layers=1)
    adapters = [pool.load(rank) for rank in (1, 3, 8, 16, 64, 2, 5)]
    segments = make_segments(2, zip(adapters, (1, 2, 1, 7, 12, 3, 2)))
    check_layers(pool, segments, 30, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
def test_widths_of_a_real_model_match_the_reference(
    make_pool: Any, make_widths: Any, make_segments: Any, assert_close: Any, dtype: torch.dtype, scattered: bool
) -> None:
    pool = make_pool(make_widths(896, 128, 4864), dtype, num_layers=1, scattered=scattered)
    adapters = [pool.load(rank) for rank in (16, 8, 3)]
    check_layers(pool, make_segments(1, zip(adapters, (1, 5, 2))), 9, assert_close)


@pytest.mark.parametrize("page_tokens", [8, 9, 16, 32])
@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
def test_page_size_and_order_of_pages_change_nothing(
    make_pool: Any, make_segments: Any, assert_close: Any, page_tokens: int, scattered: bool
) -> None:
    pool = make_pool(page_tokens=page_tokens, scattered=scattered, num_layers=2)
    adapters = [pool.load(rank) for rank in (4, 16, 1, 6)]
    check_layers(pool, make_segments(1, zip(adapters, (1, 4, 2, 9))), 17, assert_close)


def popularity(kind: str, rows: int, random: np.random.Generator) -> list[int]:
    """How many of ``rows`` each adapter gets."""
    drawn = {
        "distinct": np.arange(rows),
        "uniform": random.integers(0, rows // 3, rows),
        "zipf": np.minimum(random.zipf(1.5, rows), rows),
        "identical": np.zeros(rows, dtype=np.int64),
        "skewed": np.where(np.arange(rows) < rows - 2, 0, np.arange(rows)),
    }[kind]
    return list(Counter(drawn.tolist()).values())


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical", "skewed"])
@pytest.mark.parametrize("base_rows", [0, 5])
def test_popularity_of_adapters_changes_nothing(
    make_pool: Any, make_segments: Any, assert_close: Any, kind: str, base_rows: int
) -> None:
    pool, rows = make_pool(num_layers=1), 24
    counts = popularity(kind, rows, np.random.default_rng(3))
    adapters = [pool.load(1 + 5 * i % 17) for i in range(len(counts))]
    check_layers(pool, make_segments(base_rows, zip(adapters, counts)), base_rows + rows, assert_close)


@pytest.mark.parametrize("lengths", [(1,), (2,), (40,), (1, 39), (39, 1), (2, 38), (1, 1, 2, 2)], ids=str)
def test_segments_of_any_length_match_the_reference(
    make_pool: Any, make_segments: Any, assert_close: Any, lengths: tuple[int, ...]
) -> None:
    pool = make_pool()
    adapters = [pool.load(3 + 4 * i) for i in range(len(lengths))]
    check_layers(pool, make_segments(0, zip(adapters, lengths)), sum(lengths), assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_missing_sites_and_layers_add_nothing(
    make_pool: Any, make_segments: Any, assert_close: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype)
    adapters = [
        pool.load({"q_proj": 4, "v_proj": 2}),
        pool.load({"k_proj": 16}, layers=[1]),
        pool.load({"up_proj": 3, "down_proj": 1}, layers=[0, 2]),
        pool.load({"lm_head": 5}),
        pool.load({"embed_tokens": 7, "o_proj": 2}),
        pool.load({"v_proj": 1, "gate_proj": 8}),
        pool.load({"q_proj": 1, "k_proj": 2, "v_proj": 3}, layers=[2]),
    ]
    for lengths in ((1, 1, 1, 1, 1, 1, 1), (1, 5, 2, 6, 1, 3, 4), (4, 1, 7, 2, 5, 1, 1)):
        segments = make_segments(3, zip(adapters, lengths))
        check_layers(pool, segments, 3 + sum(lengths), assert_close)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_of_model_sites_are_found_in_every_layer(
    make_pool: Any, make_segments: Any, assert_close: Any, rank: int, rows: int
) -> None:
    pool = make_pool(num_layers=3)
    adapter = pool.load({"lm_head": rank, "embed_tokens": rank + 1, "q_proj": 2})
    check_model_sites(pool, make_segments(0, [(adapter, rows)]), rows, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1, 2), (1, 6)], ids=str)
def test_base_rows_are_bit_identical_to_a_step_without_adapters(
    make_pool: Any, make_segments: Any, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    pool = make_pool(dtype=dtype)
    segments = make_segments(4, zip([pool.load(8), pool.load(3)], lengths))
    batch, rows = AdapterBatch(segments, CPU), 4 + sum(lengths)
    for group in pool.widths.groups.values():
        y, x = pool.normal(rows, sum(group.out_features)), pool.normal(rows, group.in_features)
        before = y.clone()
        add_lora(y, x, pool.chunks(0), batch.layer_plan(0, group))
        assert torch.equal(y[:4], before[:4])
        assert not torch.equal(y[4:], before[4:])


def test_a_batch_without_work_at_a_group_has_no_plan(make_pool: Any, make_segments: Any) -> None:
    pool = make_pool()
    adapter = pool.load({"q_proj": 4}, layers=[1])
    batch = AdapterBatch(make_segments(1, [(adapter, 1)]), CPU)
    qkv, o = pool.widths.groups["qkv"], pool.widths.groups["o"]
    assert [batch.layer_plan(layer, qkv) is None for layer in range(3)] == [True, False, True]
    assert batch.layer_plan(1, o) is None
    assert batch.model_plan(pool.widths.lm_head) is None
    assert batch.embedding_plan(pool.widths.embedding, np.zeros(2, dtype=np.int64)) is None
    y = torch.ones(2, 100)
    add_lora(y, y, pool.chunks(0), None)
    add_embedding_lora(y, pool.chunks(None), None)
    assert torch.equal(y, torch.ones(2, 100))


def test_layers_that_look_alike_share_a_plan(make_pool: Any, make_segments: Any) -> None:
    pool = make_pool()
    batch = AdapterBatch(make_segments(0, [(pool.load(2), 1), (pool.load({"q_proj": 1}, layers=[2]), 5)]), CPU)
    qkv = pool.widths.groups["qkv"]
    assert batch.layer_plan(0, qkv) is batch.layer_plan(1, qkv)
    assert batch.layer_plan(2, qkv) is not batch.layer_plan(1, qkv)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_row_does_not_depend_on_its_neighbours(make_pool: Any, make_segments: Any, rms: Any, rows: int) -> None:
    pool = make_pool()
    mine, others = pool.load(8), [pool.load(rank) for rank in (1, 64, 3, 16)]
    together = make_segments(3, [(mine, rows), *zip(others, (1, 9, 2, 1))])
    (place,) = [segment for segment in together if segment.adapter is mine]
    num_rows = together[-1].stop
    for group in pool.widths.groups.values():
        y, x = pool.normal(num_rows, sum(group.out_features)), pool.normal(num_rows, group.in_features)
        own_y, own_x = y[place.start : place.stop].clone(), x[place.start : place.stop].clone()
        add_lora(y, x, pool.chunks(0), AdapterBatch(together, CPU).layer_plan(0, group))
        add_lora(own_y, own_x, pool.chunks(0), AdapterBatch([Segment(mine, 0, rows)], CPU).layer_plan(0, group))
        assert rms(y[place.start : place.stop], own_y) <= 1e-6


def test_a_row_alone_and_within_a_long_segment_agree(make_pool: Any, rms: Any) -> None:
    pool = make_pool()
    adapter, group = pool.load(8), pool.widths.groups["qkv"]
    y, x = pool.normal(12, sum(group.out_features)), pool.normal(12, group.in_features)
    alone = y.clone()
    add_lora(y, x, pool.chunks(1), AdapterBatch([Segment(adapter, 0, 12)], CPU).layer_plan(1, group))
    for row in range(12):
        plan = AdapterBatch([Segment(adapter, 0, 1)], CPU).layer_plan(1, group)
        add_lora(alone[row : row + 1], x[row : row + 1], pool.chunks(1), plan)
    assert rms(alone, y) <= 1e-6


def test_one_adapter_in_two_page_lists_gives_the_same_bits(make_pool: Any) -> None:
    results = []
    for scattered in (False, True):
        pool = make_pool(scattered=scattered)
        adapter, group = pool.load(9), pool.widths.groups["gate_up"]
        y, x = torch.zeros(7, sum(group.out_features)), pool.normal(7, group.in_features)
        segments = [Segment(adapter, 0, 2), Segment(adapter, 2, 7)]
        add_lora(y, x, pool.chunks(0), AdapterBatch(segments, CPU).layer_plan(0, group))
        results.append(y)
    assert torch.equal(*results)
