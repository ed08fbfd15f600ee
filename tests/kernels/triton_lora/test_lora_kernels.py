"""Shrink and expand of plain adapters against the plain reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_launch import StepWork, add_embedding
from loraplex.kernels.lora_plan import Segment
from loraplex.kernels.lora_reference import add_embedding_lora_reference, add_lora_reference
from loraplex.kernels.lora_tiles import DeviceEntries, list_entries

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(step: Any, rows: int, groups: list[str], assert_close: Any) -> None:
    """Groups of layer 0 of one step."""
    pool = step.pool
    for name in groups:
        group = pool.widths.groups[name]
        y, x = pool.normal(rows, sum(group.out_features)), pool.normal(rows, group.in_features)
        expected = add_lora_reference(y, x, pool.arena, step.segments, group, 0)
        assert_close(step.add(y, x, 0, group), expected)


@pytest.mark.parametrize(
    ("dtype", "hidden", "kv", "ffn"),
    [(torch.float32, 64, 100, 136), (torch.bfloat16, 100, 64, 300), (torch.float16, 200, 8, 130)],
    ids=str,
)
def test_mixed_ranks_and_odd_widths_match_the_reference(
    make_pool: Any,
    make_widths: Any,
    make_segments: Any,
    make_step: Any,
    assert_close: Any,
    dtype: torch.dtype,
    hidden: int,
    kv: int,
    ffn: int,
) -> None:
    pool = make_pool(make_widths(hidden, kv, ffn), dtype, num_layers=1)
    adapters = [pool.load({"q_proj": rank, "v_proj": rank, "down_proj": rank}) for rank in (1, 3, 8, 40)]
    step = make_step(pool, make_segments(2, zip(adapters, (1, 2, 18, 1))))
    check(step, 24, ["qkv", "down"], assert_close)


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, (128, 3)), (torch.bfloat16, (256, 3))], ids=str)
def test_high_ranks_and_a_split_input_match_the_reference(
    make_pool: Any,
    make_widths: Any,
    make_segments: Any,
    make_step: Any,
    assert_close: Any,
    dtype: torch.dtype,
    ranks: Any,
) -> None:
    pool = make_pool(make_widths(136, 896, 896), dtype, num_layers=1)
    adapters = [pool.load({"down_proj": rank}) for rank in ranks]
    step = make_step(pool, make_segments(1, zip(adapters, (1, 4))))
    check(step, 6, ["down"], assert_close)


def test_all_ranks_in_one_batch_match_the_reference(
    make_pool: Any, make_widths: Any, make_segments: Any, make_step: Any, assert_close: Any
) -> None:
    pool = make_pool(make_widths(72, 64, 136), torch.float16, num_layers=1)
    adapters = [pool.load({"o_proj": rank}) for rank in (1, 3, 8, 16, 64, 128, 256)]
    check(make_step(pool, make_segments(1, zip(adapters, (1, 2, 1, 3, 1, 1, 1)))), 11, ["o"], assert_close)


@pytest.mark.parametrize(("page_tokens", "scattered"), [(8, True), (16, False), (16, True), (32, True)])
def test_page_size_and_order_of_pages_change_nothing(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any, page_tokens: int, scattered: bool
) -> None:
    pool = make_pool(page_tokens=page_tokens, scattered=scattered, num_layers=1)
    adapters = [pool.load(rank) for rank in (4, 17)]
    check(make_step(pool, make_segments(1, zip(adapters, (1, 4)))), 6, ["qkv"], assert_close)


@pytest.mark.parametrize("lengths", [(1,), (1, 39), (39, 1), (70,), (300,)], ids=str)
def test_segments_of_any_length_match_the_reference(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any, lengths: tuple[int, ...]
) -> None:
    pool = make_pool(num_layers=1)
    adapters = [pool.load(3 + 4 * i) for i in range(len(lengths))]
    check(make_step(pool, make_segments(0, zip(adapters, lengths))), sum(lengths), ["o"], assert_close)


def popularity(kind: str, rows: int) -> list[int]:
    """How many of ``rows`` each adapter gets."""
    random = np.random.default_rng(3)
    drawn = {
        "distinct": np.arange(rows),
        "uniform": random.integers(0, rows // 3, rows),
        "zipf": np.minimum(random.zipf(1.5, rows), rows),
        "identical": np.zeros(rows, dtype=np.int64),
        "skewed": np.where(np.arange(rows) < rows - 2, 0, np.arange(rows)),
    }[kind]
    return list(Counter(drawn.tolist()).values())


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical", "skewed"])
def test_popularity_of_adapters_changes_nothing(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any, kind: str
) -> None:
    pool, counts = make_pool(num_layers=1), popularity(kind, 12)
    adapters = [pool.load(1 + 5 * i % 17) for i in range(len(counts))]
    step = make_step(pool, make_segments(2, zip(adapters, counts)))
    check(step, 14, ["o"], assert_close)


def test_missing_sites_and_layers_add_nothing(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any
) -> None:
    pool = make_pool(dtype=torch.bfloat16, num_layers=2)
    adapters = [
        pool.load({"q_proj": 4, "v_proj": 2}),
        pool.load({"k_proj": 16}, layers=[1]),
        pool.load({"lm_head": 5}),
        pool.load({"v_proj": 1, "gate_proj": 8}),
        pool.load({"k_proj": 2, "v_proj": 20}, layers=[0]),
    ]
    segments = make_segments(3, zip(adapters, (1, 5, 2, 3, 1)))
    step, group = make_step(pool, segments), pool.widths.groups["qkv"]
    for layer in range(2):
        y, x = pool.normal(15, sum(group.out_features)), pool.normal(15, group.in_features)
        expected = add_lora_reference(y, x, pool.arena, segments, group, layer)
        assert_close(step.add(y, x, layer, group), expected)


@pytest.mark.parametrize("rank", [2, 7])
def test_rows_of_model_sites_are_found_in_every_layer(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any, rank: int
) -> None:
    pool = make_pool(num_layers=3)
    adapters = [pool.load({"lm_head": rank, "q_proj": 2}), pool.load({"embed_tokens": 3, "lm_head": 5})]
    segments, head = make_segments(1, zip(adapters, (2, 1))), pool.widths.lm_head
    y, x = pool.normal(4, pool.widths.vocab), pool.normal(4, pool.widths.hidden)
    expected = add_lora_reference(y, x, pool.arena, segments, head, None)
    assert_close(make_step(pool, segments).add(y, x, None, head), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_rows_keep_their_bits(make_pool: Any, make_segments: Any, make_step: Any, dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    step, group = make_step(pool, make_segments(4, zip([pool.load(8), pool.load(3)], (1, 3)))), pool.widths.groups["o"]
    y, x = pool.normal(8, 100), pool.normal(8, 100)
    y[:4], x[:4] = float("nan"), float("nan")
    after = step.add(y.clone(), x, 0, group)
    assert torch.equal(after[:4].nan_to_num(), y[:4].nan_to_num())
    assert (after[4:] != y[4:]).any(dim=1).all()


@pytest.mark.parametrize("for_any", [True, False])
def test_a_step_of_base_rows_changes_nothing(make_pool: Any, make_step: Any, for_any: bool) -> None:
    pool = make_pool(num_layers=1)
    step, group = make_step(pool, [], (4, 4), for_any), pool.widths.groups["qkv"]
    assert not step.work.starts[..., :5].any()
    y, x = pool.normal(3, sum(group.out_features)), pool.normal(3, 100) * float("nan")
    assert torch.equal(step.add(y.clone(), x, 0, group), y)


@pytest.mark.parametrize(
    ("dtype", "others"),
    [(torch.float32, (1, 2)), (torch.float32, (1, 20)), (torch.bfloat16, (9, 66)), (torch.float16, (1, 20))],
    ids=str,
)
def test_a_row_has_the_same_bits_alone_and_among_any_neighbours(
    make_pool: Any, make_segments: Any, make_step: Any, make_widths: Any, dtype: torch.dtype, others: tuple[int, int]
) -> None:
    # Larger tiles are left out in float32: the interpreter multiplies with BLAS, whose sums go by the matrix's shape.
    pool = make_pool(make_widths(hidden=200), dtype, num_layers=1)
    mine, group = pool.load({"k_proj": 24, "v_proj": 5}), pool.widths.groups["qkv"]
    beside = [pool.load({"k_proj": 40}), pool.load({"v_proj": 3})]
    together = make_segments(3, [(mine, 2), *zip(beside, others)])
    (place,) = [segment for segment in together if segment.adapter is mine]
    rows = together[-1].stop
    y, x = pool.normal(rows, sum(group.out_features)), pool.normal(rows, group.in_features)
    alone = [
        make_step(pool, [Segment(mine, 0, 1)]).add(y[row : row + 1].clone(), x[row : row + 1], 0, group)
        for row in range(place.start, place.stop)
    ]
    before = y.clone()
    make_step(pool, together).add(y, x, 0, group)
    assert torch.equal(torch.cat(alone), y[place.start : place.stop])
    assert not torch.equal(before[place.start : place.stop], y[place.start : place.stop])


def test_an_input_summed_at_once_has_the_bits_of_one_summed_in_parts(
    make_pool: Any, make_widths: Any, make_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(make_widths(hidden=100, ffn=1300), torch.bfloat16, num_layers=1)
    segments, group = [Segment(pool.load({"down_proj": 20}), 0, 5)], pool.widths.groups["down"]
    y, x = pool.normal(5, 100), pool.normal(5, 1300)
    found = []
    in_expand, most = "SUMMED_IN_EXPAND", "MOST_PARTIAL_BYTES"
    for name, limit, how in ((in_expand, 5, (3, False)), (in_expand, 4, (3, True)), (most, 0, (1, False))):
        monkeypatch.setattr(f"loraplex.kernels.lora_grid.{name}", limit)
        step = make_step(pool, segments)
        launch = step.work.places[group.sites][1]
        assert (launch.parts, launch.sums_first) == how
        found.append(step.add(y.clone(), x, 0, group))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert not torch.equal(found[0], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capacities_and_launches_change_no_bit(
    make_pool: Any, make_segments: Any, make_step: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=1)
    segments = make_segments(1, zip([pool.load({"k_proj": 8}), pool.load({"q_proj": 3, "v_proj": 20})], (1, 18)))
    group = pool.widths.groups["qkv"]
    y, x = pool.normal(20, sum(group.out_features)), pool.normal(20, 100)
    found = []
    for programs, capacity, for_any in (
        (2, None, True),
        (64, None, False),
        (3, (256, 64), True),
        (5, (40, 512), False),
    ):
        monkeypatch.setattr("loraplex.kernels.lora_launch.resident_programs", lambda *_, n=programs: n)
        found.append(make_step(pool, segments, capacity, for_any).add(y.clone(), x, 0, group))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert not torch.equal(found[0], y)


@pytest.mark.parametrize("block_rows", [16, 64, 256])
def test_tiles_of_any_size_match_the_reference(
    make_pool: Any, make_segments: Any, make_step: Any, assert_close: Any, block_rows: int
) -> None:
    pool = make_pool(dtype=torch.float16, num_layers=1)
    segments = make_segments(1, zip([pool.load({"o_proj": 8}), pool.load({"o_proj": 3})], (1, 150)))
    check(make_step(pool, segments, block_rows=block_rows), 152, ["o"], assert_close)


def test_the_widest_input_matches_the_reference(
    make_pool: Any, make_widths: Any, make_segments: Any, make_step: Any, assert_close: Any
) -> None:
    pool = make_pool(make_widths(72, 64, 14336), torch.bfloat16, num_layers=1)
    adapters = [pool.load({"down_proj": rank}) for rank in (16, 5)]
    check(make_step(pool, make_segments(1, zip(adapters, (1, 2)))), 4, ["down"], assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedded_tokens_match_the_reference(
    make_pool: Any, make_segments: Any, make_table: Any, assert_close: Any, dtype: torch.dtype
) -> None:
    pool = make_pool(dtype=dtype, num_layers=3)
    adapters = [pool.load({"embed_tokens": 20, "lm_head": 2}), pool.load({"embed_tokens": 3}), pool.load(4)]
    segments, group = make_segments(2, zip(adapters, (1, 18, 2))), pool.widths.embedding
    table, tokens = make_table(pool, adapters), torch.from_numpy(pool.tokens(23)).to(pool.device)
    units = np.concatenate([np.full(s.stop - s.start, table.unit_of(s.adapter)) for s in segments])
    lists = list_entries(units, np.arange(2, 23))
    entries = DeviceEntries.copy_of(lists, pool.device, entries=32, tiles=8)
    y = pool.normal(23, pool.widths.hidden)
    expected = add_embedding_lora_reference(y, tokens, pool.arena, segments, group)
    work = StepWork.of(entries, table, dtype)
    add_embedding(y, tokens.int(), pool.chunks(None), table, entries, work, group)
    assert_close(y, expected)
