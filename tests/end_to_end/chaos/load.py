"""Clients that keep a server busy while things go wrong, and hold each of its answers against what it must be."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from loraplex.server.demo.tasks import BASE_ANSWER, task_named

WORDS = ("kernel", "python", "secret")
"""All clients ask the same, so that whatever is kept for one adapter and served under another one shows."""

ERROR_KEYS = {"message", "type", "param", "code"}
REQUEST_SECONDS = 60
JOIN_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as its client saw it; ``status`` is None where it was the last event of a stream."""

    status: int | None
    message: str
    code: str | None
    type: str
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over: ``text`` if it was answered in full, else ``failure``.

    Attributes:
        adapter: None for the base.
        gaps: seconds between the events of a stream, after the first one.
        goes_on: whether more may follow the answer, because the end of the sequence did not end it.
    """

    adapter: str | None
    word: str
    streamed: bool
    started: float
    seconds: float
    text: str | None = None
    failure: Failure | None = None
    gaps: tuple[float, ...] = ()
    goes_on: bool = False

    @property
    def is_right(self) -> bool:
        answer = right_answer(self.adapter, self.word)
        return self.text == answer or (self.goes_on and self.text is not None and self.text.startswith(answer))


def right_answer(adapter: str | None, word: str) -> str:
    """What an adapter called ``TASK`` or ``TASK-ANYTHING`` answers."""
    return BASE_ANSWER if adapter is None else task_named(adapter.partition("-")[0]).answer(word)


class Malformed(Exception):
    """An answer that is neither whole nor an error as OpenAI's clients know it."""


class Load:
    """Threads that ask one question after another until ``stop``; every other one streams.

    Args:
        server: asked.
        adapters: names that are asked for, each as often as it stands here; None is the base.
        clients: so many threads.
        options: further fields of each request.
    """

    def __init__(
        self,
        server: Any,
        adapters: Sequence[str | None],
        clients: int = 6,
        options: Mapping[str, Any] = {},
    ) -> None:
        self.ended: list[Ended] = []
        self.faults: list[BaseException] = []
        self._server, self._adapters, self._options = server, adapters, options
        self._over = threading.Event()
        self._asked = Counter[int]()
        self._threads = [threading.Thread(target=self._work, args=(at,), daemon=True) for at in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            self.check_ends()

    def stop(self) -> None:
        """Ask no more, and wait for what is open."""
        self._over.set()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def check_ends(self) -> None:
        """Each request has ended exactly once, whole and right, or with a proper error."""
        assert not self.faults, self.faults
        assert len(self.ended) == self._asked.total()
        wrong = [one for one in self.ended if one.text is not None and not one.is_right]
        assert not wrong, wrong[:5]

    def of(self, adapters: Collection[str | None]) -> list[Ended]:
        """What has ended so far for some adapters."""
        return [one for one in list(self.ended) if one.adapter in adapters]

    @property
    def failures(self) -> list[Ended]:
        return [one for one in list(self.ended) if one.failure is not None]

    def wait_for_answers(self, count: int, adapters: Collection[str | None] | None = None, seconds: float = 60) -> None:
        """Return when so many more requests, begun from now on, were answered in full."""
        now, deadline = time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            done = self.ended if adapters is None else self.of(adapters)
            if sum(one.text is not None and one.started >= now for one in list(done)) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(f"the server answered no {count} requests; last were {self.ended[-3:]} {self.faults}")

    def _work(self, at: int) -> None:
        rng = random.Random(at)
        with httpx2.Client(base_url=self._server.url, timeout=REQUEST_SECONDS) as client:
            while not self._over.is_set():
                adapter, word, streamed = rng.choice(self._adapters), rng.choice(WORDS), rng.random() < 0.5
                self._asked[at] += 1
                try:
                    one = ask(client, adapter, word, stream=streamed, options=self._options)
                except Exception as error:  # told to the test, which fails
                    self.faults.append(error)
                    return
                self.ended.append(one)
                if one.failure is not None:
                    self._over.wait(0.05)


def ask(
    client: httpx2.Client, adapter: str | None, word: str, *, stream: bool = False, options: Mapping[str, Any] = {}
) -> Ended:
    """One question, and how it ended.

    Raises:
        Malformed: neither with an answer nor with a proper error.
        httpx2.HTTPError: not in time, or the connection broke.
    """
    body = {"messages": [{"role": "user", "content": word}], "temperature": 0, "max_tokens": 48, "stream": stream}
    started = time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json={**body, "adapter_id": adapter, **options}) as answer:
        is_stream = stream and answer.status_code == 200
        result = _read_stream(answer) if is_stream else _read_body(answer)
    seconds, goes_on = time.monotonic() - started, bool(options.get("ignore_eos"))
    return Ended(adapter, word, stream, started, seconds, goes_on=goes_on, **result)


def _read_body(answer: httpx2.Response) -> dict[str, Any]:
    body = json.loads(answer.read())
    if answer.status_code != 200:
        return {"failure": _failure(body, answer.status_code, answer.headers.get("retry-after"))}
    [choice] = body["choices"]
    if choice["finish_reason"] not in {"stop", "length"}:
        raise Malformed(body)
    return {"text": choice["message"]["content"]}


def _read_stream(answer: httpx2.Response) -> dict[str, Any]:
    text, finish, is_done = "", None, False
    gaps: list[float] = []
    before: float | None = None
    failure: Failure | None = None
    for line in answer.iter_lines():
        if not line.startswith("data: "):
            continue
        if is_done or failure is not None:
            raise Malformed(f"an event after the last one: {line}")
        now = time.monotonic()
        gaps += [] if before is None else [now - before]
        before = now
        if line == "data: [DONE]":
            is_done = True
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            failure = _failure(event, None, None)
            continue
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    if failure is not None:
        return {"failure": failure, "gaps": tuple(gaps)}
    if not is_done or finish is None:
        raise Malformed(f"a stream that ended without a word after {text!r}")
    return {"text": text, "gaps": tuple(gaps)}


def _failure(body: Any, status: int | None, retry_after: str | None) -> Failure:
    if not (isinstance(body, dict) and isinstance(body.get("error"), dict) and body["error"].keys() >= ERROR_KEYS):
        raise Malformed(body)
    error = body["error"]
    if not (error["message"] and error["type"]):
        raise Malformed(body)
    return Failure(status, error["message"], error["code"], error["type"], retry_after)


def median(values: Iterable[float]) -> float:
    """The upper of the middle ones; there must be one."""
    found = sorted(values)
    assert found, "nothing to take the median of"
    return found[len(found) // 2]


@dataclass(slots=True)
class HealthWatch:
    """Looks at ``/health`` until it is left; ``statuses`` holds each that differs from the one before."""

    server: Any
    statuses: list[int] = field(default_factory=list)
    slowest: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> HealthWatch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(JOIN_SECONDS)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            started = time.monotonic()
            status = self.server.get("/health").status_code
            self.slowest = max(self.slowest, time.monotonic() - started)
            if self.statuses[-1:] != [status]:
                self.statuses.append(status)
