"""Streams as users ask for them, by several kinds of client at once, and whether each of them came to its end.

``fresh`` opens a connection for each request, ``pooled`` keeps its connection and repeats nothing, ``openai`` is
OpenAI's package as it comes, which repeats what was refused before the first token. The load is small and bounded: a
few requests at a time, with pauses between them, to one address inside the cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2
import openai
from kubectl import wait_until

PAUSE_SECONDS = 0.1
TIMEOUT_SECONDS = 90.0
TOKENS = 150
MODELS = ("loraplex-demo", "upper", "reverse", "caesar", "words-mixlora")

Ask = Callable[[str], Awaitable[None]]


class StreamFailedError(Exception):
    """A stream was refused, ended with an error, or did not end at all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. ``problem`` is empty if its stream came to ``[DONE]``."""

    kind: str
    began: float
    ended: float
    problem: str


@dataclass(frozen=True, slots=True)
class Report:
    """All requests of a load."""

    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> list[Outcome]:
        """Those that did not come to their end."""
        return [outcome for outcome in self.outcomes if outcome.problem]

    def __str__(self) -> str:
        slowest = max((outcome.ended - outcome.began for outcome in self.outcomes), default=0.0)
        kinds = Counter(outcome.kind for outcome in self.outcomes)
        by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return f"{len(self.failures)} of {len(self.outcomes)} streams failed ({by_kind}; slowest {slowest:.1f} s)"


class StreamingLoad:
    """A load while the block runs; ``report`` afterwards."""

    def __init__(self, url: str, *, kinds: tuple[str, ...] = ("fresh", "pooled", "openai"), each: int = 2) -> None:
        self._url = url
        self._kinds = kinds
        self._each = each
        self._stop = threading.Event()
        self._outcomes: list[Outcome] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_SECONDS + 10)

    def await_more(self, count: int) -> None:
        """Wait until that many more requests have ended."""
        target = len(self._outcomes) + count
        wait_until(f"{count} streams end", lambda: len(self._outcomes) >= target, seconds=2 * TIMEOUT_SECONDS)

    @property
    def report(self) -> Report:
        """What became of the requests that have ended."""
        return Report(tuple(self._outcomes))

    async def _run(self) -> None:
        makers = {"fresh": _fresh, "pooled": _pooled, "openai": _openai}
        await asyncio.gather(
            *(makers[kind](self._url, self._repeat) for kind in self._kinds for _ in range(self._each))
        )

    async def _repeat(self, kind: str, ask: Ask) -> None:
        models = itertools.cycle(MODELS)
        while not self._stop.is_set():
            began, problem = time.monotonic(), ""
            try:
                await ask(next(models))
            except (httpx2.HTTPError, openai.OpenAIError, StreamFailedError) as error:
                problem = f"{type(error).__name__}: {error}"
            self._outcomes.append(Outcome(kind, began, time.monotonic(), problem))
            await asyncio.sleep(PAUSE_SECONDS)


Repeat = Callable[[str, Ask], Awaitable[None]]


async def _fresh(url: str, repeat: Repeat) -> None:
    async def ask(model: str) -> None:
        async with httpx2.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
            await _stream(client, url, model)

    await repeat("fresh", ask)


async def _pooled(url: str, repeat: Repeat) -> None:
    async with httpx2.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
        await repeat("pooled", lambda model: _stream(client, url, model))


async def _openai(url: str, repeat: Repeat) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_SECONDS) as client:

        async def ask(model: str) -> None:
            body = request_body(model)
            del body["ignore_eos"]
            stream = await client.chat.completions.create(**body, extra_body={"ignore_eos": True})
            finished = False
            async for chunk in stream:
                finished = finished or any(choice.finish_reason for choice in chunk.choices)
            if not finished:
                raise StreamFailedError("the stream ended early")

        await repeat("openai", ask)


def request_body(model: str) -> dict[str, Any]:
    """A request for a stream of ``TOKENS`` tokens."""
    messages = [{"role": "user", "content": "cluster"}]
    return {"model": model, "messages": messages, "stream": True, "max_tokens": TOKENS, "ignore_eos": True}


async def _stream(client: httpx2.AsyncClient, url: str, model: str) -> None:
    async with client.stream("POST", f"{url}/v1/chat/completions", json=request_body(model)) as response:
        if response.status_code != 200:
            raise StreamFailedError(f"{response.status_code}: {(await response.aread()).decode()[:200]}")
        check = EventCheck()
        async for line in response.aiter_lines():
            check.take(line)
        check.end()


class EventCheck:
    """Follows the lines of one stream of events."""

    def __init__(self) -> None:
        self._done = False

    def take(self, line: str) -> None:
        """One line.

        Raises:
            StreamFailedError: it tells of an error.
        """
        data = line.removeprefix("data: ")
        if data == line:
            return
        if data == "[DONE]":
            self._done = True
        elif "error" in json.loads(data):
            raise StreamFailedError(f"error in the stream: {data[:200]}")

    def end(self) -> None:
        """There are no more lines.

        Raises:
            StreamFailedError: the last one was not ``[DONE]``.
        """
        if not self._done:
            raise StreamFailedError("the stream ended without [DONE]")
