"""A scheduler without an engine, over adapters that are ready at once unless a test says otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.messages import (
    AdapterRef,
    Generate,
    RouterChoice,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
    WeightedAdapter,
)
from loraplex.server.scheduler import (
    AdapterReady,
    AdapterStatus,
    Chunk,
    SampledToken,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)

EOS = 99
TOKEN = 7


def ref(name: str) -> AdapterRef:
    return AdapterRef(name=name, path=name)


class Directory:
    """Every adapter takes 2 pages and is ready, unless ``status`` says otherwise."""

    def __init__(self) -> None:
        self.status: dict[str, AdapterStatus] = {}
        self.holds: Counter[str] = Counter()
        self.lookups: list[str] = []
        self.full_of: set[str] | None = None

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        self.lookups.append(ref.name)
        return self.status.get(ref.name, AdapterReady(ref.name, 2))

    def is_at_hand(self, ref: AdapterRef) -> bool:
        return isinstance(self.status.get(ref.name, AdapterReady(ref.name, 2)), AdapterReady)

    def hold(self, ref: AdapterRef) -> None:
        self.holds[ref.name] += 1

    def release_hold(self, ref: AdapterRef) -> None:
        self.holds[ref.name] -= 1

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        return self.full_of is not None and self.full_of <= {ref.name for ref in refs}


class Rig:
    """A scheduler over ``num_pages`` pages of 4 tokens, whose sampled token is always ``TOKEN``.

    Prompts of different requests have nothing in common unless they are given.
    """

    def __init__(self, num_pages: int = 64, **limits: int) -> None:
        self.now = 0.0
        self.pool = PagePool(num_pages)
        self.kv = KvCache(self.pool, page_tokens=4)
        self.adapters = AdapterCache(self.pool)
        self.directory = Directory()
        config = SchedulerConfig(**{"max_model_len": 200, **limits}, eos_token_ids=frozenset({EOS}))
        self.scheduler = Scheduler(config, self.pool, self.kv, self.adapters, self.directory, clock=lambda: self.now)
        self._added = 0

    @property
    def num_unused(self) -> int:
        """Pages that are free, or cached without a user."""
        return self.pool.num_free + self.kv.prefixes.num_idle_pages

    def add(
        self,
        name: str,
        prompt: int | list[int] = 4,
        *,
        adapter: str | None = None,
        mix: dict[str, float] | None = None,
        n: int = 1,
        max_tokens: int = 8,
        return_routing: bool = False,
        cache_salt: str = "",
        first_token_within: float | None = None,
        **params: object,
    ) -> None:
        self._added += 1
        if isinstance(prompt, int):
            prompt = [1000 * self._added + token for token in range(prompt)]
        self.scheduler.add(
            Generate(
                request_id=name,
                prompt_ids=prompt,
                params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
                adapter=None if adapter is None else ref(adapter),
                mix=tuple(WeightedAdapter(adapter=ref(part), weight=weight) for part, weight in (mix or {}).items()),
                n=n,
                return_routing=return_routing,
                cache_salt=cache_salt,
                first_token_within=first_token_within,
            )
        )

    def arrive(self) -> None:
        """What is on its way into the pool gets there."""
        for identity in self.scheduler.page_ins.under_way:
            self.scheduler.page_ins.end(identity)

    def complete(self, plan: StepPlan, token: int = TOKEN) -> list[TokenOutput]:
        self.arrive()
        results = {chunk.sequence.seq_id: SampledToken(token) for chunk in plan.chunks if chunk.samples}
        logprobs = {
            chunk.sequence.seq_id: [
                TokenLogprob(token_id=token, logprob=-1.0)
                for token in chunk.sequence.prompt_ids[chunk.start + 1 : chunk.stop + 1]
            ]
            for chunk in plan.chunks
            if chunk.wants_prompt_logprobs
        }
        routing = {chunk.sequence.seq_id: routes(chunk) for chunk in plan.chunks if chunk.wants_routing}
        outputs = self.scheduler.complete(plan, results, logprobs, routing)
        self.scheduler.check_integrity()
        return outputs

    def step(self, token: int = TOKEN) -> list[TokenOutput]:
        return self.complete(self.scheduler.schedule(), token)

    def drain(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for _ in range(1000):
            if not self.scheduler.has_work:
                return outputs
            outputs += self.step()
        raise AssertionError("no progress")

    @staticmethod
    def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
        """Request, start and stop of each chunk."""
        return [(chunk.sequence.request.request_id, chunk.start, chunk.stop) for chunk in plan.chunks]

    def plans(self) -> list[StepPlan]:
        """Every step to the end."""
        plans: list[StepPlan] = []
        while self.scheduler.has_work:
            plans.append(self.scheduler.schedule())
            self.complete(plans[-1])
        return plans


def routes(chunk: Chunk) -> list[RouterChoice]:
    """One router per adapter, which sends the token at position p to expert p."""
    positions = range(max(chunk.start, chunk.adapter_start), chunk.stop)
    return [
        RouterChoice(
            adapter=identity,
            layer=0,
            site="mlp",
            start=positions.start,
            experts=[[position] for position in positions],
            weights=[[1.0] for _ in positions],
        )
        for identity, _ in chunk.adapters
        if positions
    ]
