"""The limits that the scheduler keeps."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PREFETCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler. ValueError for a number below 1.

    Attributes:
        max_model_len: tokens of prompt and output together.
        eos_token_ids: tokens that end a sequence.
        max_batch_tokens: tokens of one step. Also bounds the running sequences: each may need one in every step.
        max_running: sequences that run at once.
        max_waiting: waiting sequences from which on new requests are refused.
        prefill_chunk: tokens of one sequence in one step.
        max_passes: how often a sequence that is first in line and finds no pages may be passed by later ones.
        look_ahead: waiting sequences considered in one step.
        max_loading: adapters that may load at once for waiting requests; their images are held in the host store.
            The last mix of adapters to be let in may exceed it.
        max_prefetches: adapters that may be on their way into the pool at once for sequences to come; 0 is none.
        prefix_caching: whether K/V of finished sequences is kept for others that begin alike. Choices of one request
            share their prompt in any case.
    """

    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_batch_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 4096
    prefill_chunk: int = 512
    max_passes: int = 64
    look_ahead: int = 64
    max_loading: int = 32
    max_prefetches: int = MAX_PREFETCHES
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        from_one = ("max_model_len", "max_batch_tokens", "max_running", "max_waiting", "prefill_chunk", "look_ahead")
        least = dict.fromkeys((*from_one, "max_loading"), 1) | {"max_passes": 0, "max_prefetches": 0}
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise ValueError(f"{name} is at least {at_least}, not {getattr(self, name)}")
