"""The table of resident adapters: what it holds, how it grows, and when launches made before are no longer good."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.adapter_table import NO_RECORD, AdapterTable, TableCapacity, _Runs


def test_a_removed_adapter_leaves_room_for_another(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=2)
    first, second, third = (pool.load({"q_proj": rank}) for rank in (4, 8, 8))
    size = max(len(second.pages), len(third.pages))
    table = make_table(pool, [first, second], TableCapacity(units=2, records=4, pages=len(first.pages) + size))
    addresses, generation = [tensor.data_ptr() for tensor in table.tensors], table.generation
    unit = table.unit_of(second)
    table.remove(second)
    assert (table.record_of[unit] == NO_RECORD).all()
    table.add(third)
    assert table.unit_of(third) == unit
    assert table.ranks(np.array([unit]), 0, 0, 3).tolist() == [[8, 0, 0]]
    assert [tensor.data_ptr() for tensor in table.tensors] == addresses
    assert table.generation == generation


def test_a_full_table_grows_and_keeps_what_it_has(make_pool: Any, make_table: Any) -> None:
    pool = make_pool(num_layers=2)
    adapters = [pool.load({"q_proj": 1 + i, "lm_head": 2}) for i in range(9)]
    roomy, tight = make_table(pool), make_table(pool, (), TableCapacity(units=1, records=1, pages=1))
    for table in (roomy, tight):
        for adapter in adapters[:5]:
            table.add(adapter)
        table.remove(adapters[1])
        for adapter in adapters[5:]:
            table.add(adapter)
    kept = [adapter for adapter in adapters if adapter is not adapters[1]]
    for layer, first, count in ((0, 0, 3), (1, 0, 3), (None, 0, 1)):
        found = [
            table.ranks(np.array([table.unit_of(a) for a in kept]), layer, first, count) for table in (roomy, tight)
        ]
        assert np.array_equal(*found)
    for adapter in kept:
        at = int(tight.first_page[tight.unit_of(adapter)])
        assert tight.pages[at : at + len(adapter.pages)].tolist() == list(adapter.pages)
    assert tight.generation > roomy.generation
    assert all(len(getattr(tight, name)) >= 8 for name in ("first_page", "records"))
    for name in ("pages", "first_page", "record_of", "records", "scales", "routers"):
        assert torch.equal(getattr(tight, name).cpu(), torch.from_numpy(tight._host[name]))


def test_launch_facts_never_fall_and_mark_a_new_generation(make_pool: Any, make_table: Any, make_mixtures: Any) -> None:
    pool = make_pool(num_layers=1)
    table, qkv = make_table(pool), ("q_proj", "k_proj", "v_proj")
    assert [table.group_rank(qkv, 0), table.group_rank(("lm_head",), None), table.generation] == [16, 16, 0]
    assert not any((table.adapts(qkv, 0), table.adapts(("lm_head",), None)))
    large = pool.load({"q_proj": 20, "v_proj": 15, "lm_head": 17})
    table.add(large)
    assert [table.group_rank(qkv, 0), table.group_rank(("k_proj", "v_proj"), 0)] == [64, 16]
    assert [table.group_rank(("lm_head",), None), table.group_rank(("embed_tokens",), None)] == [32, 16]
    assert [table.adapts(sites, 0) for sites in (qkv, ("k_proj",), ("o_proj",))] == [True, False, False]
    before = table.generation
    assert before > 0
    table.remove(large)
    table.add(pool.load({"q_proj": 40}))
    assert table.adapts(("lm_head",), None)
    assert [table.group_rank(qkv, 0), table.generation, table.has_gains] == [64, before, False]
    bench = make_mixtures(pool)
    experts = bench.load(experts=("q_proj",), ranks=(70,), num_experts=2)
    table.add(experts)
    assert [table.group_rank(qkv, 0), table.group_rank(("q_proj",), 0)] == [128, 128]
    table.add(bench.load(plain=("k_proj",)))
    before = table.generation
    table.add(bench.load(plain=("k_proj",), gains=True))
    assert [table.has_gains, table.generation] == [True, before + 1]
    units = np.array([table.unit_of(experts), table.unit_of(experts, 1)])
    assert table.ranks(units, 0, 0, 3).tolist() == [[0, 0, 0], [70, 0, 0]]
    assert not table.gains_at(units, 0, 0, 3)


def test_sites_of_a_group_must_follow_one_another(make_pool: Any, make_table: Any) -> None:
    table: AdapterTable = make_table(make_pool(num_layers=1))
    assert table.first_site(("k_proj", "v_proj"), 0) == 1
    with pytest.raises(ValueError, match="do not follow one another"):
        table.first_site(("q_proj", "v_proj"), 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_runs_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    runs = _Runs(8)
    taken: list[tuple[int, int]] = []
    for give_back, count in steps:
        if give_back and taken:
            runs.give_back(*taken.pop(count % len(taken)))
            continue
        start = runs.take(count)
        if start is None:
            runs.grow(runs.size + 8)
            start = runs.take(count)
        assert start is not None
        taken.append((start, count))
        places = sorted(taken)
        assert all(sum(one) <= other[0] for one, other in pairwise(places))
        assert sum(places[-1]) <= runs.size
    for run in taken:
        runs.give_back(*run)
    assert runs.take(runs.size) == 0
