"""Paged attention written out plainly: one sequence, one token and one head at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex.kernels.attention_plan import SequenceSpan


def attention_reference(
    q: torch.Tensor, half_pages: torch.Tensor, spans: Sequence[SequenceSpan], window: int | None
) -> torch.Tensor:
    """``softmax(q K^T / sqrt(head_dim)) V`` of each token over those before it, itself included.

    Args:
        q: [rows, heads, head_dim]; consecutive heads share a K/V head.
        half_pages: [num_pages * 2, page_tokens, kv_heads, head_dim]: K of page ``p`` is ``2 p``, its V ``2 p + 1``.
        spans: the sequences of the step.
        window: how many tokens are visible, itself included; None is all of them.

    Returns:
        [rows, heads, head_dim] float64.
    """
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // half_pages.shape[2]
    for span in spans:
        for position in range(span.start, span.stop):
            first = 0 if window is None else max(0, position - window + 1)
            k, v = (_read_tokens(half_pages, span.pages, half, first, position + 1) for half in (0, 1))
            row = span.row + position - span.start
            for head in range(q.shape[1]):
                scores = k[:, head // group] @ q[row, head].double() / q.shape[2] ** 0.5
                out[row, head] = scores.softmax(0) @ v[:, head // group]
    return out


def _read_tokens(half_pages: torch.Tensor, pages: Sequence[int], half: int, start: int, stop: int) -> torch.Tensor:
    """[stop - start, kv_heads, head_dim] keys (half 0) or values (half 1) of a sequence's tokens, one by one."""
    page_tokens = half_pages.shape[1]
    tokens = [half_pages[2 * pages[t // page_tokens] + half, t % page_tokens] for t in range(start, stop)]
    return torch.stack(tokens).double()
