"""FlashInfer as it is called, against the plain form: a stand-in with its interface reads what it is given."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.attention import Heads
from loraplex.kernels.flashinfer_attention import (
    FlashInferAttention,
    choose_attention,
    is_installed,
    list_pages,
    load_flashinfer,
)
from loraplex.kernels.paged_decode import paged_decode_reference
from loraplex.kernels.paged_prefill import paged_prefill_reference

WORKSPACE = torch.zeros(16, dtype=torch.uint8)


class StandIn:
    """What both wrappers share: page lists to tables, and the window that FlashInfer counts without the row's own."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **options: Any) -> None:
        assert kv_layout == "NHD"
        self.options = options
        self.made.append(self)

    made: list[StandIn]

    def keep(self, indptr: Any, indices: Any, last: Any, heads: tuple[int, ...], page_size: int, rest: Any) -> None:
        for tensor in (indptr, indices, last):
            assert tensor.dtype == torch.int32
            assert tensor.device.type == "cpu"
        assert len(indices) == indptr[-1]
        assert ((last >= 1) & (last <= page_size) | (last == 0) & (indptr.diff() == 0)).all()
        assert rest["q_data_type"] == rest["kv_data_type"] == torch.bfloat16
        self.lists = (indptr, indices, last)
        self.heads, self.page_size, self.options_of_plan = heads, page_size, rest

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(table, lengths), with ids out of range where there is no page."""
        indptr, indices, last = self.lists
        counts = indptr.diff()
        table = torch.full((len(last), int(counts.max()) + 1), 2**30, dtype=torch.int32)
        for i, count in enumerate(counts.tolist()):
            table[i, :count] = indices[indptr[i] : indptr[i] + count]
        lengths = (counts - 1).clamp(min=0) * self.page_size + last
        return table, lengths.to(torch.int32)

    def check(self, q: torch.Tensor, pages: torch.Tensor) -> None:
        assert q.is_contiguous()
        assert q.dtype == pages.dtype == torch.bfloat16
        assert (q.shape[1], pages.shape[3], q.shape[2]) == self.heads
        assert pages.shape[2] == self.page_size

    @property
    def window(self) -> int:
        return int(self.options_of_plan["window_left"]) + 1


class Decode(StandIn):
    made: list[StandIn] = []  # noqa: RUF012

    def plan(
        self, indptr: Any, indices: Any, last: Any, heads: int, kv_heads: int, dim: int, page_size: int, **rest: Any
    ) -> None:
        assert set(rest) == {"window_left", "q_data_type", "kv_data_type", "sm_scale"}
        self.keep(indptr, indices, last, (heads, kv_heads, dim), page_size, rest)
        if self.options.get("use_cuda_graph"):
            to = [self.options[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices", "last_page_len")]
            assert len(to[0]) - 1 == len(to[2]) == len(last)
            assert len(indices) <= len(to[1])
            for buffer, tensor in zip(to, self.lists):
                buffer[: len(tensor)] = tensor
            self.lists = (to[0], to[1], to[2])

    def run(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        self.check(q, pages)
        assert len(q) == len(self.lists[2])
        table, lengths = self.tables()
        none = torch.empty(0)
        return paged_decode_reference(
            q, pages, table, lengths, none, none, self.options_of_plan["sm_scale"], self.window
        )


class Prefill(StandIn):
    made: list[StandIn] = []  # noqa: RUF012

    def plan(
        self,
        qo_indptr: Any,
        indptr: Any,
        indices: Any,
        last: Any,
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        *,
        causal: bool,
        **rest: Any,
    ) -> None:
        assert causal
        assert set(rest) == {"window_left", "q_data_type", "kv_data_type", "sm_scale"}
        assert qo_indptr.dtype == torch.int32
        self.keep(indptr, indices, last, (heads, kv_heads, dim), page_size, rest)
        self.qo_indptr = qo_indptr

    def run(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        self.check(q, pages)
        assert len(q) == self.qo_indptr[-1]
        table, lengths = self.tables()
        none = torch.empty(0)
        return paged_prefill_reference(
            q, pages, table, self.qo_indptr, lengths, none, self.options_of_plan["sm_scale"], self.window
        )


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Decode, "made", [])
    monkeypatch.setattr(Prefill, "made", [])
    return module  # type: ignore[no-any-return]


def attention_of(paged: Any, windows: tuple[int | None, ...] = (None,), **graph: int) -> FlashInferAttention:
    heads = Heads(paged.heads, paged.kv_heads, paged.head_dim, 1e-6)
    return FlashInferAttention(heads, paged.page_tokens, windows, torch.bfloat16, WORKSPACE, **graph)


def int32(values: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)


def plan_decode(attention: FlashInferAttention, paged: Any) -> None:
    attention.plan(paged.table.numpy(), int32(paged.lengths), int32([0]), int32([]))


@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (14, 2)])
@pytest.mark.usefixtures("flashinfer")
def test_decoding_rows_match_the_plain_form(
    make_paged: Any, assert_near: Any, window: int | None, heads: int, kv_heads: int
) -> None:
    lengths = (1, 15, 0, 16, 17, 128, 129, 90)
    hidden = [max(0, n - window) for n in lengths] if window else None
    paged = make_paged(lengths, heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16, hidden=hidden)
    q = paged.queries(len(lengths))
    attention = attention_of(paged, (window,))
    plan_decode(attention, paged)
    assert_near(attention.decode(q, paged.pages, window), paged.decode(q, window or 0, exact=True))


@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 1000])
@pytest.mark.usefixtures("flashinfer")
def test_prompts_match_the_plain_form(make_paged: Any, assert_near: Any, window: int | None) -> None:
    lengths, rows = (1, 40, 33, 100, 16), (1, 5, 33, 20, 3)
    hidden = [max(0, n - r - window + 1) for n, r in zip(lengths, rows)] if window else None
    paged = make_paged(lengths, heads=4, kv_heads=2, dtype=torch.bfloat16, hidden=hidden)
    q = paged.queries(sum(rows))
    attention = attention_of(paged, (window,))
    starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
    attention.plan(paged.table.numpy(), int32([]), starts, int32(lengths))
    assert_near(attention.prefill(q, paged.pages, window), paged.prefill(q, rows, window or 0, exact=True))


@pytest.mark.usefixtures("flashinfer")
def test_a_step_of_both_under_several_windows_is_planned_once(make_paged: Any, assert_near: Any) -> None:
    lengths, rows = (40, 7, 60, 33), (20, 33)
    paged = make_paged(lengths, dtype=torch.bfloat16)
    attention = attention_of(paged, (None, 24))
    attention.plan(paged.table.numpy(), int32(lengths[:2]), int32([0, 20, 53]), int32(lengths[2:]))
    decoding, prompts = make_paged(lengths[:2], dtype=torch.bfloat16), make_paged(lengths[2:], dtype=torch.bfloat16)
    for part in (decoding, prompts):
        part.pages = paged.pages
    decoding.table, prompts.table = paged.table[:2], paged.table[2:]
    q = paged.queries(2 + sum(rows))
    for window in (None, 24, None):
        assert_near(attention.decode(q[:2], paged.pages, window), decoding.decode(q[:2], window or 0, exact=True))
        assert_near(
            attention.prefill(q[2:], paged.pages, window), prompts.prefill(q[2:], rows, window or 0, exact=True)
        )


@pytest.mark.usefixtures("flashinfer")
def test_a_graph_reads_fixed_buffers_that_each_plan_fills(make_paged: Any, assert_near: Any) -> None:
    first, second = (make_paged(lengths, dtype=torch.bfloat16) for lengths in ((40, 7, 0), (1, 90, 17)))
    attention = attention_of(first, (None, 20), graph_rows=3, graph_pages=12)
    for paged in (first, second):
        plan_decode(attention, paged)
        for window in (None, 20):
            q = paged.queries(3)
            assert_near(attention.decode(q, paged.pages, window), paged.decode(q, window or 0, exact=True))
    assert all(wrapper.options["use_cuda_graph"] for wrapper in Decode.made)
    assert len(Decode.made) == 2
    assert not Prefill.made


@pytest.mark.usefixtures("flashinfer")
def test_a_graph_refuses_steps_that_it_was_not_made_for(make_paged: Any) -> None:
    paged = make_paged((40, 7), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a graph of 3 decoding rows cannot run 2 and 0 prompts"):
        plan_decode(attention_of(paged, graph_rows=3, graph_pages=12), paged)
    with pytest.raises(ValueError, match="a graph of 2 decoding rows cannot run 2 and 1 prompts"):
        attention_of(paged, graph_rows=2, graph_pages=12).plan(
            paged.table.numpy(), int32([3, 3]), int32([0, 1]), int32([1])
        )
    with pytest.raises(ValueError, match="a graph of 3 pages cannot run 4"):
        plan_decode(attention_of(paged, graph_rows=2, graph_pages=3), paged)


@pytest.mark.usefixtures("flashinfer")
def test_every_decode_uses_the_kernels_that_take_any_group(make_paged: Any) -> None:
    attention_of(make_paged((4,), dtype=torch.bfloat16))
    assert Decode.made[0].options == {"use_tensor_cores": True}


@pytest.mark.usefixtures("flashinfer")
def test_a_plan_waits_for_the_copies_of_the_last_one_and_for_nothing_else(
    make_paged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Event:
        def synchronize(self) -> None:
            log.append("wait")

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(Decode, "keep", lambda *_: log.append("plan"))
    paged = make_paged((4,), dtype=torch.bfloat16)
    attention = attention_of(paged)
    monkeypatch.setattr(attention, "_planned", Event())
    plan_decode(attention, paged)
    assert log == ["wait", "plan", "record on current"]


@settings(deadline=None, max_examples=200)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100))),
    window=st.integers(0, 60),
    tokens=st.sampled_from([1, 4, 16]),
)
def test_page_lists_name_every_page_that_is_seen_and_no_page_before_it(
    sequences: list[tuple[int, int]], window: int, tokens: int
) -> None:
    rows = [min(n, r) for n, r in sequences]
    lengths = [n for n, _ in sequences]
    table = np.arange(len(sequences) * 101, dtype=np.int32).reshape(-1, 101)
    lists = list_pages(table, int32(lengths), int32(rows), window, tokens)
    assert lists.indptr.dtype == lists.indices.dtype == lists.last_page_len.dtype == np.int32
    for i, (length, row) in enumerate(zip(lengths, rows)):
        seen = range(max(0, length - row - window + 1) if window else 0, length)
        pages = list(dict.fromkeys(int(table[i, key // tokens]) for key in seen))
        assert lists.indices[lists.indptr[i] : lists.indptr[i + 1]].tolist() == pages
        assert lists.last_page_len[i] == (length - (length - 1) // tokens * tokens if length else 0)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("heads", "dtype", "message"),
    [
        (Heads(2, 1, 64, 1e-6), torch.float32, "float16 or bfloat16, not torch.float32"),
        (Heads(2, 1, 80, 1e-6), torch.float16, "heads of 64, 128, 256, not of 80"),
        (Heads(3, 2, 64, 1e-6), torch.float16, "3 query heads cannot share 2"),
    ],
)
def test_a_model_that_flashinfer_has_no_kernels_for_is_refused(heads: Heads, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashInferAttention(heads, 16, (None,), dtype, WORKSPACE)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("name", "kind", "chosen"),
    [
        ("auto", "cuda", "triton"),
        ("triton", "cuda", "triton"),
        ("flashinfer", "cuda", "flashinfer"),
        ("auto", "cpu", "triton"),
        ("triton", "cpu", "triton"),
    ],
)
def test_the_setting_chooses_the_kernels(name: str, kind: str, chosen: str) -> None:
    assert choose_attention(name, torch.device(kind)) == chosen


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_on_a_cpu_is_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^attention is 'flashinfer', which needs device 'cuda', but the device is"):
        choose_attention("flashinfer", torch.device("cpu"))


def test_flashinfer_that_is_not_installed_is_refused_by_the_name_of_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not is_installed()
    with pytest.raises(ValueError, match=r"^attention is 'flashinfer', but FlashInfer is not installed; install flash"):
        choose_attention("flashinfer", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="install flashinfer-python"):
        load_flashinfer()


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_that_is_installed_is_found() -> None:
    assert is_installed()
