"""What crosses the socket between the HTTP process and the engine process.

Plain msgspec structs, tagged by class name, encoded as msgpack. Commands flow to the engine, events flow back. Each
``Generate`` is answered by any number of ``TokenOutput`` and ends exactly once per choice: by a ``TokenOutput`` with a
``finish_reason``, or, for all choices together, by one ``RequestFailed``. Each call (``LoadAdapter`` and the like) is
answered by exactly one ``CallDone`` or ``CallFailed`` with its ``call_id``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from loraplex.server.errors import ERRORS_BY_NAME, EngineError, LoraplexError
from loraplex.server.span_times import BeginTimes, EndTimes, FailTimes

FinishReason = Literal["stop", "length", "abort"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of everything that crosses the socket."""


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """A registered adapter: a name, where its files are, and which registration of that name this is.

    Unloading and loading a name again raises ``revision``, so that requests of the old registration finish on the old
    content.
    """

    name: str
    path: str
    revision: int = 0


class WeightedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of a mix; the mix adds up what each adapter changes, times its weight."""

    adapter: AdapterRef
    weight: float


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one choice is sampled. Values are validated at the HTTP edge; here they are in range.

    ``temperature`` 0 is greedy. ``top_k`` 0 is off. ``logprobs`` None is off, k >= 0 asks for the chosen token and the
    k best. ``prompt_logprobs`` likewise, for every prompt token. ``seed`` None draws one from the system.
    ``stop_token_ids`` end the sequence as the end-of-sequence tokens do; neither ends it before ``min_tokens``.
    ``max_tokens`` 0 is allowed: the prompt is only scored.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Generate(Message, frozen=True, kw_only=True):
    """Generate ``n`` choices for one prompt under one adapter, or under a mix of them, or the base model alone.

    ``adapter`` is None for the base model and where there is a ``mix``. ``return_routing`` asks for the experts that
    routers chose for each token. Only requests of equal ``cache_salt`` begin with each other's K/V. ``origin`` is what
    logs call the request. ``first_token_within`` is in how many seconds after its arrival its first token is hoped for.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None
    mix: tuple[WeightedAdapter, ...] = ()
    n: int = 1
    return_routing: bool = False
    cache_salt: str = ""
    origin: str = ""
    first_token_within: float | None = None


class Abort(Message, frozen=True, kw_only=True):
    """Stop a request, or one choice of it. The engine sends nothing further about it."""

    request_id: str
    index: int | None = None


class LoadAdapter(Message, frozen=True, kw_only=True):
    """Read and verify an adapter into the host store. Answer: ``AdapterInfo``."""

    call_id: str
    adapter: AdapterRef


class UnloadAdapter(Message, frozen=True, kw_only=True):
    """Forget a registration; running requests of it finish. Answer: None."""

    call_id: str
    adapter: AdapterRef


AdapterTier = Literal["disk", "host", "pool"]
"""Where an adapter is: the uppest tier that holds it. ``disk`` is also what would have to be fetched from elsewhere."""


class PrefetchAdapter(Message, frozen=True, kw_only=True):
    """Bring an adapter up to a tier, without keeping it there. Answer: ``AdapterInfo``."""

    call_id: str
    adapter: AdapterRef
    tier: Literal["host", "pool"] = "pool"


class PinAdapter(Message, frozen=True, kw_only=True):
    """Bring an adapter into the pool and keep it there, or keep it no longer. Answer: ``AdapterInfo``."""

    call_id: str
    adapter: AdapterRef
    pinned: bool = True


class RestoredAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What a new engine should know of a registration; ``identity`` is None if it was never read."""

    adapter: AdapterRef
    identity: str | None = None
    pinned: bool = False


class RestoreAdapters(Message, frozen=True, kw_only=True):
    """Tell a new engine of registrations: which content they must have, and which are pinned. No answer."""

    adapters: list[RestoredAdapter]


class Shutdown(Message, frozen=True, kw_only=True):
    """End the engine process."""


Command = Generate | Abort | LoadAdapter | UnloadAdapter | PrefetchAdapter | PinAdapter | RestoreAdapters | Shutdown


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, and of the best tokens at its place, best first (natural logarithm)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class RouterChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What one router chose for consecutive tokens: for each, the experts, best first, and their weights.

    ``layer`` is None and ``site`` "token" for a token-wise router; ``site`` is "mlp" for a mixture of feed-forward
    networks, else the linear whose pairs the router weighs.
    """

    adapter: str
    layer: int | None
    site: str
    start: int
    experts: list[list[int]]
    weights: list[list[float]]


class TokenOutput(Message, frozen=True, kw_only=True):
    """New tokens of one choice.

    ``logprobs`` has one entry per token id where asked for. ``prompt_logprobs`` comes once, with the first output of
    choice 0, with None for the first prompt token. Times are seconds, sent with the first output of a choice.
    ``routing``, where asked for, covers the tokens computed since the last output of the choice; ``start`` counts from
    the start of the prompt, and ``adapter`` is the adapter's name. ``began`` comes once, with the first output of the
    request, ``over`` with the last one of each choice.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    adapter_load_seconds: float | None = None
    routing: list[RouterChoice] | None = None
    began: BeginTimes | None = None
    over: EndTimes | None = None


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A ``LoraplexError`` on the wire."""

    name: str
    message: str
    param: str | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: LoraplexError) -> ErrorInfo:
        return cls(name=type(error).__name__, message=error.message, param=error.param, code=error.code)

    def to_error(self) -> LoraplexError:
        return ERRORS_BY_NAME.get(self.name, EngineError)(self.message, param=self.param, code=self.code)


class RequestFailed(Message, frozen=True, kw_only=True):
    """A request ended with an error, all its choices at once."""

    request_id: str
    error: ErrorInfo
    times: FailTimes | None = None
    origin: str = ""


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter is, known once it has been read.

    ``bytes`` counts its image in host memory, ``pages`` the pages it takes in the pool, ``identity`` is the hash of its
    content and configuration.
    """

    identity: str
    kind: str
    rank: int
    targets: list[str]
    bytes: int
    pages: int
    num_experts: int = 0
    warnings: list[str] = []


class AdapterState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a registration, named by ``path`` and ``revision``, has come to.

    ``error`` is of the last load, if that failed. ``info`` stays known when the adapter leaves the host.
    """

    path: str
    revision: int
    tier: AdapterTier = "disk"
    loading: bool = False
    pinned: bool = False
    info: AdapterInfo | None = None
    error: ErrorInfo | None = None


class AdapterStates(Message, frozen=True, kw_only=True):
    """Registrations whose state has changed since the last such event; sent with the statistics, and before the answer
    of a call that changed them. One of which nothing was ever sent is on disk and was never read."""

    states: list[AdapterState]


class CallDone(Message, frozen=True, kw_only=True):
    """The answer of a call; ``adapter`` as the call says."""

    call_id: str
    adapter: AdapterInfo | None = None


class CallFailed(Message, frozen=True, kw_only=True):
    """A call ended with an error."""

    call_id: str
    error: ErrorInfo


class EngineInfo(Message, frozen=True, kw_only=True):
    """Sent once when the engine is ready to serve.

    ``num_pages * page_tokens`` is the number of tokens whose K/V the pool could hold if it held nothing else.
    """

    model_path: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_pages: int
    page_tokens: int
    page_bytes: int
    num_parameters: int


class TierUse(msgspec.Struct, frozen=True, array_like=True):
    """What adapters of a kind take in a tier; ``pages`` are 0 but in the pool, ``kind`` is "" on disk."""

    tier: AdapterTier
    kind: str
    adapters: int
    bytes: int
    pages: int = 0


class TierLoad(msgspec.Struct, frozen=True, array_like=True):
    """An adapter that came from a tier, or from ``remote``, to another one, and how long that took."""

    source: Literal["remote", "disk", "host"]
    target: AdapterTier
    seconds: float


class TierCount(msgspec.Struct, frozen=True, array_like=True):
    """How often something happened in a tier: ``what`` is "hit" or "miss", or why things were evicted."""

    tier: AdapterTier
    what: str
    count: int


class EngineStats(Message, frozen=True, kw_only=True):
    """A snapshot for the metrics, sent at most every ``stats_interval`` while anything changes.

    Counters are totals since the engine started. ``tier_loads`` are the loads since the last snapshot, ``step_seconds``
    likewise the steps. ``tiers`` is what adapters take now; ``lookups`` and ``evictions`` count by tier.
    ``pages_cached`` hold prefixes that no sequence uses; ``pages_kv`` and ``pages_free`` are without them.
    ``pages_held`` could not be had by eviction: those in use, and those of pinned adapters.
    ``expert_tokens`` has, for the adapters with the most routed tokens, by name, how often each expert was chosen;
    empty unless it is asked for.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_kv: int = 0
    pages_adapter: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_pinned: int = 0
    pages_held: int = 0
    host_bytes: int = 0
    host_bytes_limit: int = 0
    adapters_resident: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_load_failures: int = 0
    adapter_prefetches: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    expert_tokens: dict[str, list[int]] = {}
    disk_bytes: int = 0
    disk_bytes_limit: int = 0
    tiers: list[TierUse] = []
    lookups: list[TierCount] = []
    evictions: list[TierCount] = []
    tier_loads: list[TierLoad] = []
    step_seconds: list[float] = []


class StartProgress(Message, frozen=True, kw_only=True):
    """How far the engine's start is: ``done`` of ``total`` bytes of weights read."""

    done: int
    total: int


class StartFailed(Message, frozen=True, kw_only=True):
    """The engine cannot start; it exits after this."""

    error: ErrorInfo


class OutputBatch(Message, frozen=True, kw_only=True):
    """Everything that one step has to say, in one frame."""

    outputs: list[TokenOutput] = []
    failed: list[RequestFailed] = []


Event = OutputBatch | CallDone | CallFailed | AdapterStates | EngineInfo | EngineStats | StartProgress | StartFailed
