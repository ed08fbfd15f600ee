from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loraplex.server.adapter_view import AdapterView, phase_of
from loraplex.server.engine_session import EngineSession
from loraplex.server.errors import AdapterInvalidError, LoraplexError
from loraplex.server.messages import (
    AdapterInfo,
    AdapterRef,
    AdapterState,
    AdapterStates,
    CallDone,
    CallFailed,
    Command,
    EngineInfo,
    ErrorInfo,
    Generate,
    LoadAdapter,
    OutputBatch,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    RestoredAdapter,
    SamplingParams,
    TokenOutput,
    UnloadAdapter,
    WeightedAdapter,
)

INFO = AdapterInfo(identity="abc", kind="lora", rank=1, targets=[], bytes=1, pages=1)
ERROR = ErrorInfo(name="AdapterInvalidError", message="broken")
RED, BLUE = AdapterRef(name="red", path="/red", revision=1), AdapterRef(name="blue", path="/blue", revision=2)


class Session(EngineSession):
    """A session whose engine is the test: it answers each call at once."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        super().__init__(self._hear)

    def _hear(self, command: Command) -> None:
        self.sent.append(command)
        if isinstance(command, LoadAdapter | UnloadAdapter | PinAdapter | PrefetchAdapter):
            self.answer(command)

    def answer(self, command: Any) -> None:
        if command.adapter.name == "bad":
            self.deliver(CallFailed(call_id=command.call_id, error=ERROR))
            return
        self.deliver(AdapterStates(states=[AdapterState(path=command.adapter.path, revision=command.adapter.revision)]))
        self.deliver(CallDone(call_id=command.call_id, adapter=INFO))

    def deliver(self, event: Any) -> None:
        self._deliver(event)

    def start_engine(self) -> None:
        self.deliver(
            EngineInfo(
                model_path="m",
                architecture="a",
                dtype="d",
                device="c",
                vocab_size=1,
                max_model_len=1,
                num_pages=1,
                page_tokens=1,
                page_bytes=1,
                num_parameters=1,
            )
        )


def told(ref: AdapterRef, **facts: Any) -> AdapterState:
    return AdapterState(path=ref.path, revision=ref.revision, **facts)


def test_the_last_news_of_a_registration_counts() -> None:
    view = AdapterView()
    heard: list[Any] = []
    view.on_states.append(heard.append)
    view.update([told(RED, loading=True), told(BLUE, tier="pool", info=INFO)])
    view.update([told(RED, tier="host", info=INFO)])
    assert (view.state(RED).tier, view.state(BLUE).tier) == ("host", "pool")
    assert view.state(AdapterRef(name="red", path="/red", revision=9)).tier == "disk"
    assert [len(states) for states in heard] == [2, 1]
    view.forget(RED)
    assert (view.state(RED).info, len(view)) == (None, 1)


def test_merges_made_for_requests_leave_nothing_behind() -> None:
    view = AdapterView()
    view.update([AdapterState(path=f"merged:{at}", revision=0, tier="pool") for at in range(100)])
    assert len(view) == 0


@pytest.mark.parametrize(
    ("facts", "known", "phase"),
    [
        ({}, False, "registered"),
        ({}, True, "ready"),
        ({"info": INFO}, False, "ready"),
        ({"loading": True, "error": ERROR}, True, "loading"),
        ({"error": ERROR, "info": INFO}, True, "failed"),
    ],
)
def test_a_state_has_one_word(facts: dict[str, Any], known: bool, phase: str) -> None:
    assert phase_of(told(RED, **facts), known=known) == phase


def test_a_new_engine_is_told_first_what_there_is_and_nothing_of_the_old_one_stays() -> None:
    session = Session()
    known = [RestoredAdapter(adapter=RED, identity="abc", pinned=True)]
    session.restore_from(lambda: known)
    assert session.sent == []
    session.start_engine()
    session.deliver(AdapterStates(states=[told(RED, tier="pool")]))
    session.start_engine()
    assert session.sent == [RestoreAdapters(adapters=known)] * 2
    assert session.adapters.state(RED).tier == "disk"


def test_an_engine_that_was_faster_is_told_when_the_registry_is_there() -> None:
    session = Session()
    session.start_engine()
    session.restore_from(lambda: [RestoredAdapter(adapter=BLUE, identity="abc")])
    assert len(session.sent) == 1
    session.restore_from(list)
    assert len(session.sent) == 1, "nothing to tell is not told"


async def test_calls_return_what_the_adapter_is() -> None:
    session = Session()
    session.start_engine()
    assert await session.load_adapter(RED) == INFO
    assert await session.pin_adapter(RED, True) == INFO
    assert await session.prefetch_adapter(RED, "host") == INFO
    assert len(session.adapters) == 1
    await session.unload_adapter(RED)
    assert len(session.adapters) == 0
    with pytest.raises(AdapterInvalidError, match="broken"):
        await session.prefetch_adapter(AdapterRef(name="bad", path="/bad"), "pool")


async def test_open_requests_are_counted_by_each_adapter_in_them() -> None:
    session = Session()
    session.start_engine()
    params = SamplingParams(max_tokens=1)
    mix = tuple(WeightedAdapter(adapter=ref, weight=0.5) for ref in (RED, BLUE))
    commands = [
        Generate(request_id="one", prompt_ids=[1], params=params, adapter=RED),
        Generate(request_id="two", prompt_ids=[1], params=params, mix=mix),
        Generate(request_id="three", prompt_ids=[1], params=params),
    ]
    requests = [session.generate(command) for command in commands]
    tasks = [asyncio.ensure_future(anext(request)) for request in requests]
    await asyncio.sleep(0)
    assert (session.running(RED), session.running(BLUE)) == (2, 1)
    last = TokenOutput(request_id="one", index=0, token_ids=[1], finish_reason="stop")
    session.deliver(OutputBatch(outputs=[last]))
    await tasks[0]
    with pytest.raises(StopAsyncIteration):
        await anext(requests[0])
    assert session.running(RED) == 1
    session._requests.fail_all(lambda: LoraplexError("gone"))
    await asyncio.gather(*tasks[1:], return_exceptions=True)
    assert (session.running(RED), session.running(BLUE), len(session._requests.running)) == (0, 0, 0)
