"""Where each sequence's keys and values lie, as index tensors, for one step.

A page holds K and V of ``page_tokens`` tokens as ``[2, page_tokens, kv_heads, head_dim]``: half page ``2 p`` is K of
page ``p``, half page ``2 p + 1`` its V. Page ids are the same in every layer, so one plan serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.kernels.device_arrays import to_device


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """The new tokens of one sequence in a step.

    Attributes:
        row: first row of the step.
        start, stop: their positions in the sequence.
        pages: the sequence's page list, long enough for ``stop`` tokens.
    """

    row: int
    start: int
    stop: int
    pages: Sequence[int]

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Sequences with one new token each and page lists of like length.

    Attributes:
        rows: [batch] int64 rows of the step.
        k_pages, v_pages: [batch, pages] int64.
        unused: [n] int64, positions of the gathered tokens that belong to no sequence.
        masks: additive mask [batch, 1, 1, pages * page_tokens] for each attention window of the model.
    """

    rows: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    unused: torch.Tensor
    masks: dict[int | None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence with several new tokens: rows [start, stop) of the step; masks [rows, num_keys] by window."""

    start: int
    stop: int
    num_keys: int
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    masks: dict[int | None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Everything that attention needs to know of a step.

    Attributes:
        positions: [rows] int64.
        k_slots, v_slots: [rows] int64, where each row's K and V go.
    """

    positions: torch.Tensor
    k_slots: torch.Tensor
    v_slots: torch.Tensor
    buckets: tuple[DecodeBucket, ...]
    prefills: tuple[PrefillSpan, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlanner:
    """Makes the plan of each step.

    Args:
        page_tokens: tokens in a page.
        windows: the distinct attention windows of the model's layers; None is full attention.
        dtype: of the masks.
        device: of all tensors.
    """

    page_tokens: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device

    def plan(self, spans: Sequence[SequenceSpan]) -> AttentionPlan:
        """Plan a step whose rows are those of ``spans``, in order."""
        positions = np.concatenate([np.arange(span.start, span.stop, dtype=np.int64) for span in spans])
        pages = np.concatenate([self._page_of_rows(span) for span in spans])
        slot = positions % self.page_tokens
        decoding = [span for span in spans if span.num_rows == 1]
        return AttentionPlan(
            self._tensor(positions),
            self._tensor(2 * pages * self.page_tokens + slot),
            self._tensor((2 * pages + 1) * self.page_tokens + slot),
            tuple(self._bucket(spans_) for spans_ in self._split_by_length(decoding)),
            tuple(self._prefill(span) for span in spans if span.num_rows > 1),
        )

    def _page_of_rows(self, span: SequenceSpan) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        positions = np.arange(span.start, span.stop, dtype=np.int64)
        first = span.start // self.page_tokens
        pages = np.asarray(span.pages[first : (span.stop - 1) // self.page_tokens + 1], dtype=np.int64)
        return pages[positions // self.page_tokens - first]

    def _pages_used(self, span: SequenceSpan) -> int:
        return -(-span.stop // self.page_tokens)

    def _split_by_length(self, spans: Sequence[SequenceSpan]) -> list[list[SequenceSpan]]:
        """Group sequences so that none is padded to more than twice its length."""
        groups: list[list[SequenceSpan]] = []
        for span in sorted(spans, key=self._pages_used, reverse=True):
            if groups and 2 * self._pages_used(span) >= self._pages_used(groups[-1][0]):
                groups[-1].append(span)
            else:
                groups.append([span])
        return groups

    def _bucket(self, spans: Sequence[SequenceSpan]) -> DecodeBucket:
        width = self._pages_used(spans[0])
        pages = np.empty((len(spans), width), dtype=np.int64)
        for i, span in enumerate(spans):
            used = self._pages_used(span)
            pages[i, :used] = span.pages[:used]
            pages[i, used:] = span.pages[0]
        stop = np.array([span.stop for span in spans], dtype=np.int64)[:, None]
        key = np.arange(width * self.page_tokens, dtype=np.int64)[None, :]
        return DecodeBucket(
            self._tensor(np.array([span.row for span in spans], dtype=np.int64)),
            self._tensor(2 * pages),
            self._tensor(2 * pages + 1),
            self._tensor(np.flatnonzero(key >= stop)),
            {window: self._mask(stop - 1, key, window)[:, None, None, :] for window in self.windows},
        )

    def _prefill(self, span: SequenceSpan) -> PrefillSpan:
        pages = np.asarray(span.pages[: self._pages_used(span)], dtype=np.int64)
        query = np.arange(span.start, span.stop, dtype=np.int64)[:, None]
        key = np.arange(span.stop, dtype=np.int64)[None, :]
        masks = {window: self._mask(query, key, window) for window in self.windows}
        stop = span.row + span.num_rows
        return PrefillSpan(span.row, stop, span.stop, self._tensor(2 * pages), self._tensor(2 * pages + 1), masks)

    def _mask(
        self,
        query: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        key: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        window: int | None,
    ) -> torch.Tensor:
        """[queries, keys], 0 where the key is visible: not later than the query, and among the window's last keys."""
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask).to(self.device, self.dtype, non_blocking=True)

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        return to_device(array, self.device)
