"""Token-wise routing, worked out for the whole vocabulary at load: the router is not run again while serving.

The route depends on what the first layer's attention reads, which is the token's embedding after a norm, and so on the
token alone.
"""

from __future__ import annotations

import torch

from loraplex.memory.adapter_config import CONFIG_NAME
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import BaseWeights, Routing, TokenRoutes
from loraplex.memory.serial_torch import one_thread

MAX_TABLE_BYTES = 64 << 20
_TOKENS_AT_ONCE = 1024
_BYTES_PER_CHOICE = 6


def token_routes(
    router: torch.Tensor, routing: Routing, base_weights: BaseWeights | None, vocab_size: int
) -> TokenRoutes:
    """The ``routing.limit`` best experts of every token and their weights; the lowest index first among equals.

    Args:
        router: [num_experts, hidden], any floating dtype.
        routing: ``limit`` and ``renormalize`` count.
        base_weights: of the served base, for what its first layer reads.
        vocab_size: tokens that the base knows.

    Errors: AdapterFileError if there are no base weights, or the table would be above 64 MiB.
    """
    if base_weights is None:
        raise AdapterFileError(
            f"peft_type in {CONFIG_NAME}: token-wise routing follows from the base's embedding, so it can be read only "
            "with the base's weights at hand (--base MODEL on the command line)",
            key="peft_type",
        )
    largest = MAX_TABLE_BYTES // (vocab_size * _BYTES_PER_CHOICE)
    if routing.limit > largest:
        raise AdapterFileError(
            f"top_k in {CONFIG_NAME}: {routing.limit} experts for each of {vocab_size} tokens take too much memory; "
            f"expected at most {largest}",
            key="top_k",
        )
    with one_thread():
        return _table(router, routing, base_weights, vocab_size)


def _table(router: torch.Tensor, routing: Routing, base_weights: BaseWeights, vocab_size: int) -> TokenRoutes:
    experts = torch.empty(vocab_size, routing.limit, dtype=torch.int16)
    weights = torch.empty(vocab_size, routing.limit)
    transposed = router.float().T.contiguous()
    for start in range(0, vocab_size, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, vocab_size)
        logits = base_weights.first_inputs(start, stop).float() @ transposed
        best, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        chosen = best[:, : routing.limit]
        experts[start:stop] = order[:, : routing.limit]
        weights[start:stop] = chosen / chosen.sum(dim=1, keepdim=True) if routing.renormalize else chosen
    return TokenRoutes(experts, weights)
