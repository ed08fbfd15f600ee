"""Reads a JSON body and checks it against its model; whatever is wrong with it is a 400 that names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from loraplex.server.errors import InvalidRequestError
from loraplex.server.schemas import MIX_FORM, NAME_FORM, RequestModel

Body = TypeVar("Body", bound=RequestModel)

MAX_SHOWN = 80


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's body.

    Raises:
        InvalidRequestError: it is no JSON, or breaks a rule of the model.
        PayloadTooLargeError: it exceeds the server's limit.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequestError("The body must be JSON, sent with the header 'content-type: application/json'.")
    return parse_body(await request.body(), model)


def parse_body(raw: bytes, model: type[Body]) -> Body:
    """A body from its bytes; see ``read_body``."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_context=False)) from error


def invalid_request(faults: Sequence[ErrorDetails]) -> InvalidRequestError:
    """The first fault that a model found, as an error for the client."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return InvalidRequestError(f"The body is not valid JSON: {fault['msg'].removeprefix('Invalid JSON: ')}.")
    param = path_of(fault["loc"])
    code = "unsupported_parameter" if fault["type"] == "unsupported_parameter" else None
    return InvalidRequestError(_sentence(param, fault), param=param or None, code=code)


def path_of(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    path = ""
    for step in location:
        if step in {NAME_FORM, MIX_FORM}:
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


def _sentence(param: str, fault: ErrorDetails) -> str:
    reason = fault["msg"][:1].lower() + fault["msg"][1:]
    if fault["type"] == "missing":
        return f"'{param}' is missing; it is required."
    if fault["type"] == "extra_forbidden":
        return f"'{param}' is no known field; leave it out."
    subject = f"'{param}'" if param else "The body"
    return f"{subject}: {reason}; got {_shown(fault['input'])}."


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def inlined_schema(model: type[RequestModel]) -> dict[str, Any]:
    """The model's JSON schema without references, for the OpenAPI page."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if isinstance(reference := node.get("$ref"), str):
            return inline(definitions[reference.rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items()}

    inlined = inline(schema)
    return dict(inlined)


def body_schema(model: type[RequestModel]) -> dict[str, Any]:
    """What a route that reads its own body tells the OpenAPI page."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined_schema(model)}}}}
