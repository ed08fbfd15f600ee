"""The operators that a step is made of, as ``torch.library`` custom ops with fake implementations.

Each has an implementation here on plain tensors, which is the CPU backend and runs on any device. Kernels for a device
register under the same names and take precedence there. All gathers go through int64 index tensors made on the host
(``lora_plan.py``, ``attention_plan.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_library = torch.library.Library("loraplex", "DEF")
_library.define("shrink(Tensor x, Tensor chunks, Tensor a_ids, Tensor x_ids) -> Tensor")
_library.define("expand(Tensor low_rank, Tensor chunks, Tensor b_ids, Tensor b_rows, Tensor bag_starts) -> Tensor")
_library.define(
    "route(Tensor logits, Tensor limits, Tensor renormalize, Tensor top_p, Tensor temperature) -> (Tensor, Tensor)"
)
_library.define("write_kv(Tensor(a!) slots, Tensor k, Tensor v, Tensor k_slots, Tensor v_slots) -> ()")
_library.define(
    "decode_attention(Tensor q, Tensor half_pages, Tensor k_pages, Tensor v_pages, Tensor unused, Tensor mask)"
    " -> Tensor"
)
_library.define(
    "prefill_attention(Tensor q, Tensor half_pages, Tensor k_pages, Tensor v_pages, int num_keys, Tensor mask)"
    " -> Tensor"
)


def shrink(x: torch.Tensor, chunks: torch.Tensor, a_ids: torch.Tensor, x_ids: torch.Tensor) -> torch.Tensor:
    """``h[n] = sum_c <chunks[a_ids[n, c]], x[x_ids[n, c]]>``, in fp32.

    Args:
        x: [num_x_chunks, 128].
        chunks: [num_chunks, 128], same dtype.
        a_ids, x_ids: [n, in_chunks] int64.

    Returns:
        [n] float32.
    """
    return torch.ops.loraplex.shrink(x, chunks, a_ids, x_ids)


def expand(
    low_rank: torch.Tensor,
    chunks: torch.Tensor,
    b_ids: torch.Tensor,
    b_rows: torch.Tensor,
    bag_starts: torch.Tensor,
) -> torch.Tensor:
    """``y[bag] = sum over the bag's j of low_rank[b_rows[j]] * chunks[b_ids[j]]``, summed in fp32; an empty bag is 0.

    Args:
        low_rank: [n] float32.
        chunks: [num_chunks, 128].
        b_ids, b_rows: [m] int64.
        bag_starts: [num_bags] int64, ascending; a bag ends where the next begins.

    Returns:
        [num_bags, 128] in the dtype of ``chunks``.
    """
    return torch.ops.loraplex.expand(low_rank, chunks, b_ids, b_rows, bag_starts)


def route(
    logits: torch.Tensor,
    limits: torch.Tensor,
    renormalize: torch.Tensor,
    top_p: torch.Tensor,
    temperature: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's experts: ``p = softmax(logits) / temperature``, from the largest p on, the lowest index first
    among equals, at most ``limits`` of them and none once the p before it sum to more than ``top_p``; where
    ``renormalize``, the weights are divided by the sum of those chosen.

    Args:
        logits: [rows, E] float32, -inf for experts that a row does not have.
        limits: [rows] int64.
        renormalize: [rows] bool.
        top_p: [rows] float32, infinite for no bound.
        temperature: [rows] float32, 1 for none.

    Returns:
        Experts [rows, E] int64, best first, and their weights [rows, E] float32, 0 for those not chosen.
    """
    return torch.ops.loraplex.route(logits, limits, renormalize, top_p, temperature)


def write_kv(
    slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_slots: torch.Tensor, v_slots: torch.Tensor
) -> None:
    """Store the keys and values of new tokens: ``slots[k_slots[t]] = k[t]`` and likewise v.

    Args:
        slots: [num_slots, kv_heads * head_dim], one layer of the arena; changed in place.
        k, v: [rows, kv_heads * head_dim].
        k_slots, v_slots: [rows] int64.
    """
    torch.ops.loraplex.write_kv(slots, k, v, k_slots, v_slots)


def decode_attention(
    q: torch.Tensor,
    half_pages: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    unused: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attention of one query token per sequence over its pages.

    Args:
        q: [batch, kv_heads, group, head_dim]: the query heads of each K/V head stand together.
        half_pages: [num_pages * 2, page_tokens, kv_heads, head_dim], one layer of the arena.
        k_pages, v_pages: [batch, pages] int64 ids of half pages, padded with any readable ids.
        unused: [n] int64 positions, among the batch * pages * page_tokens gathered, that hold no token of the sequence.
        mask: [batch, 1, 1, pages * page_tokens] additive, -inf where there is nothing to see.

    Returns:
        [batch, kv_heads, group, head_dim].
    """
    return torch.ops.loraplex.decode_attention(q, half_pages, k_pages, v_pages, unused, mask)


def prefill_attention(
    q: torch.Tensor,
    half_pages: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    num_keys: int,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attention of one sequence's new tokens over its pages.

    Args:
        q: [group, kv_heads, rows, head_dim].
        half_pages: [num_pages * 2, page_tokens, kv_heads, head_dim], one layer of the arena.
        k_pages, v_pages: [pages] int64 ids of half pages.
        num_keys: tokens of the sequence so far, the new ones included.
        mask: [rows, num_keys] additive.

    Returns:
        [group, kv_heads, rows, head_dim].
    """
    return torch.ops.loraplex.prefill_attention(q, half_pages, k_pages, v_pages, num_keys, mask)


@torch.library.impl(_library, "shrink", "CompositeExplicitAutograd")
def _shrink_reference(x: torch.Tensor, chunks: torch.Tensor, a_ids: torch.Tensor, x_ids: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        products = chunks.index_select(0, a_ids.view(-1)).float() * x.float().index_select(0, x_ids.view(-1))
        return products.view(a_ids.shape[0], -1).sum(-1)
    # The gradient of an embedding bag by its weights is a gather of dot products: no copy of the gathered rows is made.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, chunks, a_ids.view(-1), a_ids.new_empty(0), x_ids.view(-1), 0
    )
    return dots.view(a_ids.shape).sum(-1)


@torch.library.impl(_library, "expand", "CompositeExplicitAutograd")
def _expand_reference(
    low_rank: torch.Tensor,
    chunks: torch.Tensor,
    b_ids: torch.Tensor,
    b_rows: torch.Tensor,
    bag_starts: torch.Tensor,
) -> torch.Tensor:
    weights = low_rank.to(chunks.dtype).index_select(0, b_rows)
    return F.embedding_bag(b_ids, chunks, bag_starts, mode="sum", per_sample_weights=weights)


@torch.library.impl(_library, "route", "CompositeExplicitAutograd")
def _route_reference(
    logits: torch.Tensor,
    limits: torch.Tensor,
    renormalize: torch.Tensor,
    top_p: torch.Tensor,
    temperature: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    p = logits.softmax(-1) / temperature[:, None]
    p, experts = p.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(p.shape[1], device=p.device)
    before = F.pad(p.cumsum(-1)[:, :-1], (1, 0))
    chosen = (place < limits[:, None]) & ((place == 0) | (before <= top_p[:, None]))
    weights = torch.where(chosen, p, 0.0)
    total = torch.where(renormalize, weights.sum(-1), 1.0)
    return experts, torch.where(chosen, weights / total[:, None], 0.0)


@torch.library.impl(_library, "write_kv", "CompositeExplicitAutograd")
def _write_kv_reference(
    slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_slots: torch.Tensor, v_slots: torch.Tensor
) -> None:
    slots.index_copy_(0, k_slots, k)
    slots.index_copy_(0, v_slots, v)


@torch.library.impl(_library, "decode_attention", "CompositeExplicitAutograd")
def _decode_attention_reference(
    q: torch.Tensor,
    half_pages: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    unused: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    batch = q.shape[0]
    gathered = []
    for pages in (k_pages, v_pages):
        tokens = half_pages.index_select(0, pages.view(-1)).flatten(0, 1)
        tokens.index_fill_(0, unused, 0.0)  # what lies there may be NaN, and 0 * NaN is not 0
        gathered.append(tokens.view(batch, -1, *tokens.shape[1:]).transpose(1, 2))
    return F.scaled_dot_product_attention(q, gathered[0], gathered[1], attn_mask=mask)


@torch.library.impl(_library, "prefill_attention", "CompositeExplicitAutograd")
def _prefill_attention_reference(
    q: torch.Tensor,
    half_pages: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    num_keys: int,
    mask: torch.Tensor,
) -> torch.Tensor:
    group = q.shape[0]
    k, v = (
        half_pages.index_select(0, pages).flatten(0, 1)[:num_keys].transpose(0, 1).expand(group, -1, -1, -1)
        for pages in (k_pages, v_pages)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.library.register_fake("loraplex::shrink")
def _shrink_fake(x: torch.Tensor, chunks: torch.Tensor, a_ids: torch.Tensor, x_ids: torch.Tensor) -> torch.Tensor:
    return x.new_empty((a_ids.shape[0],), dtype=torch.float32)


@torch.library.register_fake("loraplex::expand")
def _expand_fake(
    low_rank: torch.Tensor,
    chunks: torch.Tensor,
    b_ids: torch.Tensor,
    b_rows: torch.Tensor,
    bag_starts: torch.Tensor,
) -> torch.Tensor:
    return chunks.new_empty((bag_starts.shape[0], chunks.shape[1]))


@torch.library.register_fake("loraplex::route")
def _route_fake(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(logits, dtype=torch.int64), torch.empty_like(logits)


@torch.library.register_fake("loraplex::write_kv")
def _write_kv_fake(
    slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_slots: torch.Tensor, v_slots: torch.Tensor
) -> None:
    return None


@torch.library.register_fake("loraplex::decode_attention")
def _decode_attention_fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q)


@torch.library.register_fake("loraplex::prefill_attention")
def _prefill_attention_fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q)
