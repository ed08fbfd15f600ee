"""The events of one streamed answer: read, and told apart from failures. Both clients use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from loraplex.clients.answers import REQUEST_ID_HEADER
from loraplex.clients.errors import ErrorDetails, StreamInterrupted
from loraplex.clients.failures import error_fields, origin, text_or_none, unreadable
from loraplex.clients.types import Json, StreamEvent

DONE = "[DONE]"
_SHOWN_CHARACTERS = 200


class EventReader:
    """Reads the events of an answer; comments never get here.

    Args:
        response: whose status is 200, not read yet.
        read: makes an event of its JSON.

    Raises:
        UnexpectedResponse: the answer is no stream of events.
    """

    def __init__(self, response: httpx2.Response, read: Callable[[Json], StreamEvent]) -> None:
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "text/event-stream":
            raise unreadable(response, f"{origin(response.request)} answered with {kind!r} instead of a stream")
        self._response = response
        self._read = read
        self._done = False

    @property
    def source(self) -> httpx2.EventSource:
        """The events to give to ``read``, for one iteration. One may be large: an echoed prompt with logprobs."""
        return httpx2.EventSource(self._response, max_event_size=None)

    def read(self, event: httpx2.ServerSentEvent) -> StreamEvent | None:
        """What an event tells; None for nothing. StreamInterrupted if it tells of a failure."""
        data = event.data.strip()
        if data == DONE:
            self._done = True
        if self._done or not data:
            return None
        chunk = self._parsed(data)
        if "error" in chunk:
            raise self._interrupted("the server gave up", error_fields(chunk))
        try:
            return self._read(chunk)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._unreadable(data) from error

    def end(self) -> None:
        """To be called when no more events come; StreamInterrupted if the answer was not over."""
        if not self._done:
            raise self._interrupted("the connection was lost before the answer was over")

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """Turns the loss of the connection into an error of ours. After the answer's end it is of no account."""
        try:
            yield
        except httpx2.TimeoutException as error:
            if not self._done:
                raise self._interrupted("the server fell silent") from error
        except httpx2.RequestError as error:
            if not self._done:
                raise self._interrupted(f"the connection was lost: {error}") from error

    def _parsed(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise self._unreadable(data) from error
        if not isinstance(chunk, dict):
            raise self._unreadable(data)
        return chunk

    def _unreadable(self, data: str) -> StreamInterrupted:
        return self._interrupted(f"an event cannot be read: {data[:_SHOWN_CHARACTERS]!r}")

    def _interrupted(self, message: str, told: dict[str, Any] | None = None) -> StreamInterrupted:
        told = told or {}
        return StreamInterrupted(
            ErrorDetails(
                message=text_or_none(told.get("message")) or message,
                status=self._response.status_code,
                type=text_or_none(told.get("type")),
                param=text_or_none(told.get("param")),
                code=text_or_none(told.get("code")),
                request_id=self._response.headers.get(REQUEST_ID_HEADER),
            )
        )
