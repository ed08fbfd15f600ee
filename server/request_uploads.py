"""Reads a multipart body piece by piece: fields as text, files straight to the disk, never whole in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from loraplex.server.errors import InvalidRequestError, PayloadTooLargeError
from loraplex.server.request_body import inlined_schema
from loraplex.server.schemas import RequestModel
from loraplex.server.upload_archive import FILE_NAMES

UPLOAD_PATH = "/v1/adapters"
FORM = "multipart/form-data"
ARCHIVE = "file"
"""Name of the part that is an archive."""

FIELDS = ("id", "tags", "pinned", "replace")
MAX_FIELD_BYTES = 16 * 1024
MAX_PARTS = 64
OVERHEAD_BYTES = 1 << 20
"""What boundaries, headers and fields of a form may take beside its files."""

_FLUSH_BYTES = 1 << 20


def is_upload(scope: Scope) -> bool:
    """Whether a request brings files, for which there is a limit of its own."""
    if scope["method"] != "POST" or scope["path"] != UPLOAD_PATH:
        return False
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() == FORM


def upload_schema(model: type[RequestModel]) -> dict[str, Any]:
    """What the route tells the OpenAPI page: a JSON body that names a path, or a form that brings the files."""
    text, file = {"type": "string"}, {"type": "string", "format": "binary"}
    parts = dict.fromkeys(FIELDS, text) | dict.fromkeys((*FILE_NAMES, ARCHIVE), file)
    form = {"schema": {"type": "object", "properties": parts, "required": ["id"]}}
    body = {"schema": inlined_schema(model)}
    return {"requestBody": {"required": True, "content": {"application/json": body, FORM: form}}}


class UploadForm:
    """One form on its way in.

    Args:
        folder: where files are written, under their own names; an archive as ``file``.
        limit: the most bytes of the whole body.

    Attributes:
        fields: text by name, each occurrence.
        files: what was written.
    """

    def __init__(self, request: Request, folder: Path, limit: int) -> None:
        self.fields: dict[str, list[str]] = {}
        self.files: set[str] = set()
        self._request = request
        self._folder = folder
        self._limit = limit
        self._events: list[bytes | tuple[str, str] | None] = []
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._value = b""
        self._is_over = False

    async def read(self) -> None:
        """Reads the body to its end.

        Raises:
            InvalidRequestError: it is no such form, or has a part that is not known.
            PayloadTooLargeError: it exceeds the limit.
            OSError: a file cannot be written.
        """
        target: _Part | None = None
        num_parts = 0
        try:
            async for event in self._parts():
                if isinstance(event, tuple):
                    num_parts += 1
                    if num_parts > MAX_PARTS:
                        raise InvalidRequestError(f"The form has more than {MAX_PARTS} parts.")
                    target = self._begin(*event)
                elif target is not None and event is not None:
                    await target.write(event)
                elif target is not None:
                    await self._end(target)
                    target = None
        finally:
            if target is not None:
                target.close()

    async def _parts(self) -> AsyncIterator[bytes | tuple[str, str] | None]:
        """(name, file name) where a part begins, its bytes, and None where it ends."""
        parser = self._parser()
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > self._limit:
                raise too_large(self._limit)
            try:
                parser.write(chunk)
            except FormParserError as error:
                raise InvalidRequestError(f"The body is no valid form: {error}.") from error
            for event in self._events:
                yield event
            self._events.clear()
        if not self._is_over:
            raise InvalidRequestError("The form ends too early: its last boundary is missing.")

    def _parser(self) -> MultipartParser:
        _, options = parse_options_header(self._request.headers.get("content-type"))
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise InvalidRequestError(f"The header 'content-type: {FORM}' names no boundary.")
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
                    "on_part_end": lambda: self._events.append(None),
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"The header 'content-type: {FORM}' is not valid: {error}.") from error

    def _on_part_begin(self) -> None:
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name, file_name = (options.get(key, b"").decode("utf-8", "replace") for key in (b"name", b"filename"))
        self._events.append((name, file_name))

    def _on_end(self) -> None:
        self._is_over = True

    def _begin(self, name: str, file_name: str) -> _Part:
        if name in FIELDS and not file_name:
            return _Part(name, None)
        kept = next((one for one in (name, _base(file_name)) if one in FILE_NAMES), None)
        if kept is None and name == ARCHIVE:
            kept = ARCHIVE
        if kept is None:
            accepted = ", ".join((*FIELDS, *FILE_NAMES, ARCHIVE))
            shown = (file_name or name)[:80]
            raise InvalidRequestError(f"The form has a part {shown!r}; accepted are {accepted}.", param=name[:80])
        if kept in self.files:
            raise InvalidRequestError(f"The form has '{kept}' twice.", param=kept)
        self.files.add(kept)
        return _Part(kept, (self._folder / kept).open("xb"))

    async def _end(self, part: _Part) -> None:
        await part.finish()
        if part.is_field:
            self.fields.setdefault(part.name, []).append(part.text())


class _Part:
    """One part: a field that is gathered, or a file that is written in a thread."""

    def __init__(self, name: str, file: IO[bytes] | None) -> None:
        self.name = name
        self.is_field = file is None
        self._file = file
        self._waiting = bytearray()

    async def write(self, data: bytes) -> None:
        self._waiting += data
        if self._file is None and len(self._waiting) > MAX_FIELD_BYTES:
            raise InvalidRequestError(f"'{self.name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self.name)
        if self._file is not None and len(self._waiting) >= _FLUSH_BYTES:
            await self._flush(self._file)

    async def finish(self) -> None:
        if self._file is not None:
            await self._flush(self._file)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def text(self) -> str:
        try:
            return self._waiting.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"'{self.name}' is not UTF-8.", param=self.name) from error

    async def _flush(self, file: IO[bytes]) -> None:
        waiting, self._waiting = self._waiting, bytearray()
        await asyncio.to_thread(file.write, waiting)


def too_large(limit: int) -> PayloadTooLargeError:
    """The error for an upload beyond the limit of the setting."""
    return PayloadTooLargeError(
        f"The upload is too large; accepted are at most {limit} bytes (the setting 'max_adapter_bytes')."
    )


def _base(file_name: str) -> str:
    """The last part of a file's name, as clients of either kind of system write paths."""
    return file_name.replace("\\", "/").rpartition("/")[2]
