"""What the calls return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of its prompt, of all its choices together, and of the prompt those found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RouterRun:
    """What one router chose for consecutive tokens, prompt and answer counted together.

    Attributes:
        adapter: whose router it is.
        layer: None for a router that decides once for all layers.
        site: "token" for such a router, "mlp" for a mixture of feed-forward networks, else the name of a linear.
        start: the first token, counted from the start of the prompt.
        experts: for each token, those chosen, best first.
        weights: for each token, the weights of these.
    """

    adapter: str
    layer: int | None
    site: str
    start: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the ``n`` texts of an answer.

    Attributes:
        finish_reason: "stop" or "length".
        logprobs: as the API writes them, where they were asked for.
        routing: what routers chose, where it was asked for; those of the prompt are with the first choice.
    """

    index: int
    text: str
    finish_reason: str | None
    logprobs: Json | None = None
    routing: tuple[RouterRun, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, of a completion or of a chat.

    Attributes:
        model: what the server calls that which answered.
        request_id: the server's name for the request; its logs carry it.
        raw: the body as it came.
    """

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    request_id: str | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> Json | None:
        """Log-probabilities of the first choice, as the API writes them."""
        return self.choices[0].logprobs

    @property
    def routing(self) -> tuple[RouterRun, ...]:
        """What routers chose for the prompt and the first choice, where it was asked for."""
        return self.choices[0].routing


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A piece of a streamed answer.

    Attributes:
        text: what to append to the choice; may be empty.
        index: which of the ``n`` choices; None in the last event, which tells the usage alone.
        finish_reason: in the last piece of a choice, why it ended.
        logprobs: of this piece, as the API writes them, where they were asked for.
        routing: what routers chose for the tokens computed since the last piece, where it was asked for.
        usage: in the last event.
        raw: the event as it came.
    """

    text: str
    index: int | None = 0
    finish_reason: str | None = None
    logprobs: Json | None = None
    routing: tuple[RouterRun, ...] = ()
    usage: Usage | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as the server knows it. What it has not read yet is None.

    Attributes:
        parent: the base model.
        created: when it was registered, in Unix seconds.
        revision: counts the registrations.
        tier: where its weights are now: "disk", "host" or "pool".
        state: "registered" (never read), "loading", "ready" or "failed" (the last time it was read).
        error: why it could not be read the last time.
        source: "file" for a folder, "upload", or the kind of remote source: "s3", "gs", "az" or "hf".
        pinned: whether it is kept in the pool.
        identity: hash of what it computes; equal for equal adapters, whatever their names.
        num_experts: 0 for an adapter without a router.
        targets: adapted matrices.
        bytes: size of its weights on the host.
        pages: what it takes of the pool.
        running: requests that use it now.
        warnings: what its owner should know although it is served.
    """

    name: str
    path: str
    parent: str | None = None
    created: int | None = None
    revision: int | None = None
    tier: str | None = None
    state: str | None = None
    error: str | None = None
    source: str | None = None
    pinned: bool = False
    tags: tuple[str, ...] = ()
    identity: str | None = None
    kind: str | None = None
    rank: int | None = None
    num_experts: int | None = None
    targets: tuple[str, ...] | None = None
    bytes: int | None = None
    pages: int | None = None
    running: int = 0
    warnings: tuple[str, ...] = ()
    raw: Json = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Model:
    """The base model, whose ``parent`` is None, or an adapter under its name as a model.

    Attributes:
        root: where it was read from.
        max_model_len: longest context in tokens, once the server is ready.
        kind: of an adapter, once it was read by a load.
        num_experts: likewise.
    """

    id: str
    created: int
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    kind: str | None = None
    num_experts: int | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list; ``next_after`` is the cursor of the next one, None after the last."""

    items: tuple[T, ...]
    next_after: str | None
