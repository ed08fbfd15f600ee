"""A server without a model: a tiny byte-level tokenizer, an engine that answers as it is told, uvicorn on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import settings
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_view import AdapterView
from loraplex.server.app import create_app
from loraplex.server.engine_client import EngineState, Restore, StatsCallback, TargetTier
from loraplex.server.errors import LoraplexError
from loraplex.server.http_config import HttpConfig
from loraplex.server.http_server import DrainingServer
from loraplex.server.messages import (
    AdapterInfo,
    AdapterRef,
    AdapterState,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    Generate,
    RestoredAdapter,
    RouterChoice,
    TokenLogprob,
    TokenOutput,
)
from loraplex.server.registry_file import RegistryFile
from loraplex.server.tokens import TextTokenizer

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'function' %}{{ raise_exception('no functions here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if shout is defined %}SHOUT{{ shout }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BASE_NAME = "tiny"
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>")


def make_byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A token per byte and two special ones: the ids of bytes follow the order of their letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=chat_template
    )


@dataclass
class Script:
    """What the fake engine does with a request.

    Args:
        text: what it generates, over and over up to ``max_tokens``.
        eos_after: it ends with the end-of-sequence token after so many tokens.
        delay: seconds before each output.
        first_delay: seconds before the first one.
        error: raised after ``error_after`` outputs.
        chunk: tokens per output.
        routed_layers: layers whose routers it tells of, where it is asked to.
    """

    text: str = "Hello, world! "
    eos_after: int | None = None
    delay: float = 0.0
    first_delay: float = 0.0
    error: Exception | None = None
    error_after: int = 0
    chunk: int = 1
    routed_layers: int = 0


@dataclass
class FakeEngine:
    """An ``EngineClient`` without a model. It remembers what it was asked, and what was taken back.

    ``loaded`` has the last adapter read under each name; ``open`` those of requests
    that are being answered.
    """

    tokenizer: TextTokenizer
    script: Script = field(default_factory=Script)
    state: EngineState = "ready"
    restarts: int = 0
    stats: EngineStats = field(default_factory=EngineStats)
    on_stats: list[StatsCallback] = field(default_factory=list)
    max_model_len: int = 256
    num_pages: int = 64
    commands: list[Generate] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted_choices: list[tuple[str, int]] = field(default_factory=list)
    adapters: AdapterView = field(default_factory=AdapterView)
    loaded: dict[str, AdapterRef] = field(default_factory=dict)
    unloaded: list[AdapterRef] = field(default_factory=list)
    pins: list[tuple[str, int, bool]] = field(default_factory=list)
    prefetched: list[tuple[str, str]] = field(default_factory=list)
    restored: list[list[RestoredAdapter]] = field(default_factory=list)
    open: list[AdapterRef] = field(default_factory=list)
    load_error: LoraplexError | None = None
    pin_error: LoraplexError | None = None
    on_load: Callable[[AdapterRef], None] | None = None
    load_delay: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model_path="/models/tiny",
            architecture="LlamaForCausalLM",
            dtype="float32",
            device="cpu",
            vocab_size=258,
            max_model_len=self.max_model_len,
            num_pages=self.num_pages,
            page_tokens=16,
            page_bytes=4096,
            num_parameters=1000,
        )

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, command: Generate) -> AsyncGenerator[TokenOutput, None]:
        self.commands.append(command)
        refs = [part.adapter for part in command.mix] + ([command.adapter] if command.adapter else [])
        self.open += refs
        try:
            await asyncio.sleep(self.script.first_delay)
            plans = [self._plan(command, index) for index in range(command.n)]
            sent = 0
            while plans:
                for plan in list(plans):
                    if (command.request_id, plan[0].index) in self.aborted_choices:
                        plans.remove(plan)
                        continue
                    if self.script.error is not None and sent >= self.script.error_after:
                        raise self.script.error
                    await asyncio.sleep(self.script.delay)
                    yield plan.pop(0)
                    sent += 1
                    if not plan:
                        plans.remove(plan)
            self.finished.append(command.request_id)
        finally:
            for ref in refs:
                self.open.remove(ref)
            if command.request_id not in self.finished:
                self.aborted.append(command.request_id)

    def abort_choice(self, request_id: str, index: int) -> None:
        self.aborted_choices.append((request_id, index))

    def running(self, ref: AdapterRef) -> int:
        return self.open.count(ref)

    @property
    def wanted(self) -> list[tuple[str, int]]:
        return [(ref.path, ref.revision) for ref in self.open]

    def restore_from(self, restore: Restore) -> None:
        self.restored.append(restore())

    async def load_adapter(self, ref: AdapterRef) -> AdapterInfo:
        await asyncio.sleep(self.load_delay)
        if self.on_load is not None:
            self.on_load(ref)
        if self.load_error is not None:
            self.tell(ref, error=ErrorInfo.of(self.load_error))
            raise self.load_error
        self.loaded[ref.name] = ref
        return self.tell(ref)

    async def unload_adapter(self, ref: AdapterRef) -> None:
        self.unloaded.append(ref)
        self.adapters.forget(ref)

    async def pin_adapter(self, ref: AdapterRef, pinned: bool) -> AdapterInfo | None:
        if self.pin_error is not None and pinned:
            raise self.pin_error
        self.pins.append((ref.name, ref.revision, pinned))
        return self.tell(ref, tier="pool", pinned=pinned)

    async def prefetch_adapter(self, ref: AdapterRef, tier: TargetTier) -> AdapterInfo:
        self.prefetched.append((ref.name, tier))
        return self.tell(ref, tier=tier)

    def tell(self, ref: AdapterRef, **state: Any) -> AdapterInfo:
        """Tells that an adapter has got into a state: read and on the host, unless it is said otherwise."""
        info = adapter_info(ref, **self.facts)
        told = {"tier": "disk"} if "error" in state else {"tier": "host", "info": info}
        self.adapters.update([AdapterState(path=ref.path, revision=ref.revision, **(told | state))])
        return info

    def _plan(self, command: Generate, index: int) -> list[TokenOutput]:
        """All outputs of a choice. Choice 1 says the text from its second letter on, and so forth."""
        ids, reason = self._ids(command, index)
        chunk = self.script.chunk
        pieces = [ids[at : at + chunk] for at in range(0, len(ids), chunk)] or [[]]
        return [
            TokenOutput(
                request_id=command.request_id,
                index=index,
                token_ids=piece,
                logprobs=[self._score(one, command.params.logprobs) for one in piece]
                if command.params.logprobs is not None
                else None,
                prompt_logprobs=self._prompt_scores(command) if index == at == 0 else None,
                finish_reason=reason if at == len(pieces) - 1 else None,
                cached_tokens=4 if index == at == 0 else 0,
                queue_seconds=0.001 if at == 0 else None,
                routing=self._routes(command, index, at * chunk, len(piece)) if command.return_routing else None,
            )
            for at, piece in enumerate(pieces)
        ]

    def _routes(self, command: Generate, index: int, num_before: int, num_tokens: int) -> list[RouterChoice]:
        """Of the tokens computed for an output: all but its last; the first output of choice 0 has the prompt's, too.

        Experts and weights tell the token's position.
        """
        first = len(command.prompt_ids) + max(num_before - 1, 0)
        start = 0 if index == num_before == 0 else first
        rows = range(start, len(command.prompt_ids) + max(num_before + num_tokens - 1, 0))
        return [
            RouterChoice(
                adapter="red",
                layer=layer,
                site="mlp",
                start=start,
                experts=[[at % 8, layer] for at in rows],
                weights=[[float(at), 0.5] for at in rows],
            )
            for layer in range(self.script.routed_layers if rows else 0)
        ]

    def _ids(self, command: Generate, index: int) -> tuple[list[int], Any]:
        text = self.tokenizer.encode(self.script.text, add_special_tokens=False)
        limit = command.params.max_tokens
        ids = [text[(index + at) % len(text)] for at in range(limit)]
        if self.script.eos_after is not None and self.script.eos_after < limit and not command.params.ignore_eos:
            return [*ids[: self.script.eos_after], 257], "stop"
        return ids, "length"

    def _prompt_scores(self, command: Generate) -> list[TokenLogprob | None] | None:
        if command.params.prompt_logprobs is None:
            return None
        return [None, *(self._score(one, command.params.prompt_logprobs) for one in command.prompt_ids[1:])]

    def _score(self, token_id: int, top: int | None) -> TokenLogprob:
        """The chosen token is the best, the next ids follow, the last of them impossible."""
        best = [(token_id + rank, -0.5 - rank) for rank in range(top or 0)]
        if len(best) > 1:
            best[-1] = (best[-1][0], float("-inf"))
        return TokenLogprob(token_id, -0.5, best)


def adapter_info(ref: AdapterRef, **changes: Any) -> AdapterInfo:
    """What an engine says of an adapter."""
    facts: dict[str, Any] = {
        "identity": f"id-{ref.revision}",
        "kind": "lora",
        "rank": 8,
        "targets": ["q_proj"],
        "bytes": 1024,
        "pages": 2,
    }
    return AdapterInfo(**(facts | changes))


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(make_byte_tokenizer())


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes tokenizers, with the chat template as argument."""
    return make_byte_tokenizer


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture
def registry() -> AdapterRegistry:
    registry = AdapterRegistry(BASE_NAME)
    registry.register_all(AdapterRef(name=name, path=f"/adapters/{name}") for name in ("red", "blue"))
    return registry


@pytest.fixture
def make_app(engine: FakeEngine, registry: AdapterRegistry, tokenizer: TextTokenizer) -> Callable[..., Any]:
    """Makes the app, with fields of its configuration as arguments."""

    def make(own_tokenizer: TextTokenizer | None = None, state: Any = None, watch: Any = None, **fields: Any) -> Any:
        # Scrapes see the latest, and standard output, where unconfigured logs go, is what commands print.
        config = HttpConfig(model_name=BASE_NAME, **({"metrics_share": math.inf, "access_log": False} | fields))
        return create_app(engine, registry, own_tokenizer or tokenizer, config, state=state, watch=watch)

    return make


@pytest.fixture
def state(tmp_path: Path) -> Iterator[RegistryFile]:
    """A state folder, open."""
    file = RegistryFile(tmp_path / "state")
    yield file
    file.close()


@pytest.fixture
def make_client(make_app: Callable[..., Any]) -> Callable[..., TestClient]:
    """Makes a client that calls the app without a socket."""
    return lambda **fields: TestClient(make_app(**fields), raise_server_exceptions=False)


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    with make_client() as client:
        yield client


@pytest.fixture(scope="module")
def shared_client(tokenizer: TextTokenizer) -> Iterator[TestClient]:
    """A client of one app for all tests of a file; its engine is at ``client.app.state.edge.engine``."""
    app = create_app(FakeEngine(tokenizer), AdapterRegistry(BASE_NAME), tokenizer, HttpConfig(model_name=BASE_NAME))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


class LoopbackServer:
    """The app behind a real socket, in a thread of its own."""

    def __init__(self, app: Any, drain_seconds: float = 5.0, linger_seconds: float = 0.0) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", lifespan="on", ws="none")
        lifecycle = app.state.edge.lifecycle
        self.server = DrainingServer(config, lifecycle, drain_seconds=drain_seconds, linger_seconds=linger_seconds)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> LoopbackServer:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self._socket.close()


@pytest.fixture
def serve(make_app: Callable[..., Any]) -> Iterator[Callable[..., LoopbackServer]]:
    """Starts servers, with fields of the configuration as arguments; all stop with the test."""
    with contextlib.ExitStack() as stack:

        def start(linger_seconds: float = 0.0, **fields: Any) -> LoopbackServer:
            server = LoopbackServer(make_app(**fields), fields.get("drain_seconds", 5.0), linger_seconds)
            return stack.enter_context(server)

        yield start
