"""Attention of a step by FlashInfer (https://arxiv.org/abs/2501.01005), over the same pages as our own kernels.

Its paged layout "NHD", ``[pages, 2, page_tokens, kv_heads, head_dim]``, is ours. It is optional: nothing is imported
before somebody asks for it. Written for the interface of flashinfer-python 0.6.18
(https://docs.flashinfer.ai/api/attention.html).

FlashInfer shares out the keys of a batch among programs so that all have as much to do. How a row's keys are split thus
depends on its neighbours, and so do its last bits; ``paged_decode`` and ``paged_prefill`` keep them.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.kernels.attention import Heads

WORKSPACE_BYTES = 384 << 20
"""Room for the partial results of split keys."""

HEAD_DIMS = (64, 128, 256)
"""Sizes of heads that its kernels are made for."""

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


def is_installed() -> bool:
    """Whether FlashInfer can be imported."""
    return importlib.util.find_spec("flashinfer") is not None


def choose_attention(name: str, device: torch.device) -> str:
    """The kernels that the setting ``attention`` stands for: "triton" or "flashinfer".

    ``auto`` is triton, whose rows do not depend on their neighbours, to the last bit.

    Args:
        name: the setting.
        device: of the model. Off CUDA, "triton" means the plain forms of the same operators.

    Raises:
        ValueError: FlashInfer is asked for and cannot be had; the message names the setting.
    """
    if name != "flashinfer":
        return "triton"
    if device.type != "cuda":
        raise ValueError(
            f"attention is 'flashinfer', which needs device 'cuda', but the device is '{device.type}'; "
            "use 'triton' or 'auto'"
        )
    if not is_installed():
        raise ValueError(
            "attention is 'flashinfer', but FlashInfer is not installed; install flashinfer-python, "
            "or use 'triton' or 'auto'"
        )
    return name


def load_flashinfer() -> Any:
    """The module ``flashinfer``. RuntimeError where it is not installed."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise RuntimeError(f"FlashInfer cannot be imported: {error}; install flashinfer-python") from error


def allocate_workspace(device: torch.device) -> torch.Tensor:
    """Scratch memory that all ``FlashInferAttention`` of one stream share."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class PageLists:
    """The pages of some sequences, one list behind the other, without those that lie before every query's window.

    Attributes:
        indptr: [n + 1] int32, where each sequence's list starts and, last, the number of pages.
        indices: [pages] int32.
        last_page_len: [n] int32, tokens on each sequence's last page; 0 for a sequence of no keys.
    """

    indptr: Int32Array
    indices: Int32Array
    last_page_len: Int32Array


def list_pages(table: Int32Array, lengths: Int32Array, rows: Int32Array | int, window: int, tokens: int) -> PageLists:
    """What FlashInfer needs of a page table.

    Leaving out whole pages at the front changes no result: causality and windows count from a sequence's end. They may
    be gone, and their ids mean nothing. Of the pages that are named, all keys up to the sequence's end are read; those
    before the window have weight 0 and must be finite.

    Args:
        table: [n, max_pages] int32.
        lengths: [n] int32, keys of each sequence.
        rows: of each sequence, its last tokens: [n] int32, or one number for all.
        window: keys that a row sees, its own included; 0 is all.
        tokens: of a page.
    """
    skipped = np.maximum(lengths - rows - window + 1, 0) // tokens if window else np.zeros_like(lengths)
    counts = -(-lengths // tokens) - skipped
    indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    stops = skipped + counts
    lists = [row[first:stop] for row, first, stop in zip(table, skipped.tolist(), stops.tolist())]
    indices = np.concatenate([np.zeros(0, dtype=np.int32), *lists])  # quicker than an index for each page
    last = np.where(lengths > 0, (lengths - 1) % tokens + 1, 0)
    return PageLists(indptr, indices, last.astype(np.int32))


class FlashInferAttention:
    """Attention of steps of one kind: of any shape, or of one number of rows, which may then be in a CUDA graph.

    Call ``plan`` once for each step and outside a graph, then ``decode`` and ``prefill`` in each layer. A graph is
    captured after a ``plan`` and a first run, which builds and loads kernels; each replay follows a ``plan``.

    FlashInfer holds 8 MiB on the device, and as much page-locked memory, for each window of each object.

    Args:
        heads: of the model.
        page_tokens: tokens of a page.
        windows: the distinct attention windows of the model's layers; None is full attention.
        dtype: of queries, keys and values.
        workspace: of ``allocate_workspace``; everything runs on its device.
        graph_rows: the number of rows, all decoding, where steps are replayed from a graph; 0 where none is.
        graph_pages: the most pages that such a step reads.

    Raises:
        ValueError: a dtype, head size or number of heads that FlashInfer has no kernels for.
        RuntimeError: it is not installed.
    """

    def __init__(
        self,
        heads: Heads,
        page_tokens: int,
        windows: tuple[int | None, ...],
        dtype: torch.dtype,
        workspace: torch.Tensor,
        *,
        graph_rows: int = 0,
        graph_pages: int = 0,
    ) -> None:
        _check(heads, dtype)
        self._heads, self._page_tokens, self._dtype = heads, page_tokens, dtype
        self._device = workspace.device
        self._graph_rows, self._graph_pages = graph_rows, graph_pages
        self._flashinfer = load_flashinfer()
        self._windows = tuple(dict.fromkeys(window or 0 for window in windows))
        self._decoders = {window: self._make_decoder(workspace) for window in self._windows}
        self._prefillers = {} if graph_rows else {window: self._make_prefiller(workspace) for window in self._windows}
        self._planned = torch.cuda.Event() if self._device.type == "cuda" else None

    def plan(
        self, page_table: Int32Array, lengths: Int32Array, row_starts: Int32Array, prompt_lengths: Int32Array
    ) -> None:
        """Prepare a step: rows that decode, then the chunks of prompts. All arrays are the host's.

        The host waits until what the last plan copied has been read, for FlashInfer writes over it. Where the results
        of the step before the last have been read, as when steps are queued one ahead, that is no wait.

        Args:
            page_table: [B + S, max_pages] int32, of the decoding rows, then of the prompts.
            lengths: [B] int32, keys of each decoding row; 0 yields zeros.
            row_starts: [S + 1] int32, the first row of each prompt, counted from B, and, last, their number.
            prompt_lengths: [S] int32, keys of each prompt; its rows are the last of them, one at least.

        Raises:
            ValueError: a step that the graph was not made for.
        """
        rows, prompts = len(lengths), len(prompt_lengths)
        if self._graph_rows and (rows != self._graph_rows or prompts):
            raise ValueError(f"a graph of {self._graph_rows} decoding rows cannot run {rows} and {prompts} prompts")
        if self._planned is not None:
            self._planned.synchronize()
        for window in self._windows:
            if rows:
                self._plan_decode(window, list_pages(page_table[:rows], lengths, 1, window, self._page_tokens))
            if prompts:
                pages = list_pages(page_table[rows:], prompt_lengths, np.diff(row_starts), window, self._page_tokens)
                self._plan_prefill(window, row_starts, pages)
        if self._planned is not None:
            self._planned.record(torch.cuda.current_stream(self._device))

    def decode(self, q: torch.Tensor, pages: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """``paged_decode`` of the planned rows.

        Args:
            q: [B, H, D].
            pages: [P, 2, T, KVH, D], one layer of the arena.
            window: one of the model's.

        Returns:
            [B, H, D].
        """
        result: torch.Tensor = self._decoders[window or 0].run(q.contiguous(), pages)
        return result

    def prefill(self, q: torch.Tensor, pages: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """``paged_prefill`` of the planned prompts: ``q [rows, H, D]`` and the result likewise; see ``decode``."""
        result: torch.Tensor = self._prefillers[window or 0].run(q.contiguous(), pages)
        return result

    def _make_decoder(self, workspace: torch.Tensor) -> Any:
        # Only the kernels that use tensor cores take groups of any size.
        if not self._graph_rows:
            return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        indptr, indices, last = (
            torch.zeros(count, dtype=torch.int32, device=self._device)
            for count in (self._graph_rows + 1, self._graph_pages, self._graph_rows)
        )
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last,
        )

    def _make_prefiller(self, workspace: torch.Tensor) -> Any:
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def _plan_decode(self, window: int, pages: PageLists) -> None:
        if self._graph_rows and len(pages.indices) > self._graph_pages:
            raise ValueError(f"a graph of {self._graph_pages} pages cannot run {len(pages.indices)}")
        heads = self._heads
        self._decoders[window].plan(
            self._host(pages.indptr),
            self._host(pages.indices).to(self._device, non_blocking=True),
            self._host(pages.last_page_len),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_tokens,
            window_left=window - 1,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            sm_scale=heads.scale,
        )

    def _plan_prefill(self, window: int, row_starts: Int32Array, pages: PageLists) -> None:
        heads = self._heads
        self._prefillers[window].plan(
            self._host(row_starts),
            self._host(pages.indptr),
            self._host(pages.indices).to(self._device, non_blocking=True),
            self._host(pages.last_page_len),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_tokens,
            causal=True,
            window_left=window - 1,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            sm_scale=heads.scale,
        )

    def _host(self, array: Int32Array) -> torch.Tensor:
        """A tensor of the host, which ``plan`` reads there; page-locked, so that no copy to the device waits."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _check(heads: Heads, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention by FlashInfer needs float16 or bfloat16, not {dtype}; set attention to 'triton'")
    if heads.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention by FlashInfer needs heads of {', '.join(map(str, HEAD_DIMS))}, not of {heads.head_dim}; "
            "set attention to 'triton'"
        )
    if heads.num_heads % heads.num_kv_heads:
        raise ValueError(f"{heads.num_heads} query heads cannot share {heads.num_kv_heads} heads of keys")
