"""One block of keys of paged attention inside a Triton kernel, with the running softmax of FlashAttention.

Scores stay in base 2: ``p = 2^(scale * log2(e) * q k - peak)``, https://arxiv.org/abs/2205.14135. A block of which
a query sees nothing changes nothing, to the bit, so a query's result does not depend on which queries share its tile.
"""

from __future__ import annotations

from loraplex.kernels.triton_runtime import jit, tl

LOG2_E = 1.4426950408889634


@jit
def attend_block(
    q: tl.tensor,
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    pages: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    low: tl.tensor,
    stop: tl.tensor,
    position: tl.tensor,
    head: tl.tensor,
    scale: tl.tensor,
    page_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Let queries [M, D_PAD] see the keys [start, start + BLOCK): returns acc [M, D_PAD], peak and total [M].

    Only keys in [low, stop) are read; each query sees those up to its position, of them the last WINDOW (0: all).
    Without MASKED every query must see every key of the block.
    """
    key = start + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    here = (key >= low) & (key < stop)
    if MASKED:
        page = tl.load(table + key // PAGE, mask=here, other=0).to(tl.int64)
    else:
        page = tl.load(table + key // PAGE).to(tl.int64)
    at = pages + page * page_stride + ((key % PAGE) * KV_HEADS + head) * D
    k_at = at[None, :] + d[:, None]
    v_at = at[:, None] + PAGE * KV_HEADS * D + d[None, :]
    if MASKED:
        k = tl.load(k_at, mask=here[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=here[:, None] & (d < D)[None, :], other=0.0)
    elif D == D_PAD:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
    scores = tl.dot(q.to(DOT), k.to(DOT), input_precision="ieee")
    if MASKED:
        seen = here[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    # A query that has seen nothing yet has no peak, and -inf less -inf is NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores * scale - base[:, None])
    kept = tl.exp2(peak - base)
    total = total * kept + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * kept[:, None], input_precision="ieee")
    return acc, new_peak, total
