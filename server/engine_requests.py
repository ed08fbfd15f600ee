"""The open requests and calls of one engine, as its clients in this event loop wait for them."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable

from loraplex.server.errors import LoraplexError
from loraplex.server.messages import (
    Abort,
    CallDone,
    CallFailed,
    Command,
    Event,
    Generate,
    OutputBatch,
    RequestFailed,
    TokenOutput,
)

Send = Callable[[Command], None]


class OpenRequest:
    """A request whose outputs are awaited."""

    __slots__ = ("aborted", "finished", "num_choices", "outputs")

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices
        self.finished: set[int] = set()
        self.aborted: set[int] = set()
        self.outputs: asyncio.Queue[TokenOutput | LoraplexError | None] = asyncio.Queue()

    def finish(self, index: int) -> None:
        """One choice is over; after the last one the stream ends."""
        self.finished.add(index)
        if len(self.finished) == self.num_choices:
            self.outputs.put_nowait(None)


class EngineRequests:
    """Pairs what is sent to an engine with what comes back. All methods run in one event loop.

    Args:
        send: passes a command to the engine; must not wait.

    Attributes:
        running: open requests by the path and revision of each adapter in them.
    """

    def __init__(self, send: Send) -> None:
        self.running: Counter[tuple[str, int]] = Counter()
        self._send = send
        self._open: dict[str, OpenRequest] = {}
        self._calls: dict[str, asyncio.Future[CallDone]] = {}
        self._call_ids = itertools.count()

    async def generate(self, command: Generate) -> AsyncGenerator[TokenOutput, None]:
        """Send a request and yield its outputs until every choice is over; closing the generator aborts it."""
        request = self._open[command.request_id] = OpenRequest(command.n)
        adapters = _adapters_of(command)
        self.running.update(adapters)
        is_over = False
        try:
            self._send(command)
            while (output := await request.outputs.get()) is not None:
                if isinstance(output, LoraplexError):
                    is_over = True
                    raise output
                if output.index not in request.aborted:
                    yield output
            is_over = True
        finally:
            del self._open[command.request_id]
            self._end_running(adapters)
            if not is_over:
                self._send(Abort(request_id=command.request_id))

    def abort_choice(self, request_id: str, index: int) -> None:
        """One choice is over for the client, whatever the engine thinks; unknown and finished ones are ignored."""
        request = self._open.get(request_id)
        if request is not None and index not in request.finished:
            self._send(Abort(request_id=request_id, index=index))
            request.aborted.add(index)
            request.finish(index)
        elif request is not None:
            request.aborted.add(index)

    async def call(self, make: Callable[[str], Command]) -> CallDone:
        """Send a call, made by ``make`` from its id, and wait for its answer."""
        call_id = str(next(self._call_ids))
        answer: asyncio.Future[CallDone] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            self._send(make(call_id))
            return await answer
        finally:
            del self._calls[call_id]

    def deliver(self, event: Event) -> None:
        """Hand an event to whoever waits for it; the others are not for requests."""
        match event:
            case OutputBatch(outputs=outputs, failed=failed):
                self._deliver_outputs(outputs, failed)
            case CallDone(call_id=call_id):
                self._answer(call_id, event)
            case CallFailed(call_id=call_id, error=error):
                self._answer(call_id, error.to_error())

    def fail_all(self, make_error: Callable[[], LoraplexError]) -> None:
        """End every open request and call with an error."""
        for request in self._open.values():
            request.outputs.put_nowait(make_error())
        for call_id in list(self._calls):
            self._answer(call_id, make_error())

    def _end_running(self, adapters: Iterable[tuple[str, int]]) -> None:
        for key in adapters:
            self.running[key] -= 1
            if not self.running[key]:
                del self.running[key]

    def _deliver_outputs(self, outputs: Iterable[TokenOutput], failed: Iterable[RequestFailed]) -> None:
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None or output.index in request.finished:
                continue
            request.outputs.put_nowait(output)
            if output.finish_reason is not None:
                request.finish(output.index)
        for failure in failed:
            if failure.request_id in self._open:
                error = failure.error.to_error()
                error.times = failure.times
                self._open[failure.request_id].outputs.put_nowait(error)

    def _answer(self, call_id: str, answer: CallDone | LoraplexError) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            return
        if isinstance(answer, LoraplexError):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _adapters_of(command: Generate) -> list[tuple[str, int]]:
    refs = [part.adapter for part in command.mix] + ([] if command.adapter is None else [command.adapter])
    return [(ref.path, ref.revision) for ref in refs]
