"""Structured logs on standard error: for people on a console, or one JSON object a line.

What looks like a secret is cut out of every line, wherever it comes from: queries and users of URLs (object stores sign
URLs in their queries, and libraries put those into their errors), bearer tokens, and fields named like keys.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Literal

import structlog

_QUERY = re.compile(r"""([A-Za-z][\w+.-]*://[^\s?#'"<>]+)[?#][^\s'"<>]*""")
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/@'\"<>]+@")
_BEARER = re.compile(r"\b(bearer)\s+[\w.~+/=-]+", re.IGNORECASE)
_SECRET_FIELDS = frozenset({"authorization", "api_key", "api_token", "token", "password", "secret"})
_CUT = "..."


def without_secrets(text: str) -> str:
    """A text without queries and users of URLs, and without bearer tokens."""
    if "://" in text:
        text = _USER.sub(r"\1", _QUERY.sub(rf"\1?{_CUT}", text))
    return _BEARER.sub(rf"\1 {_CUT}", text)


def cut_secrets(
    logger: structlog.typing.WrappedLogger, method: str, event_dict: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A processor: ``without_secrets`` on every field that is a text."""
    del logger, method
    for name, value in event_dict.items():
        if name in _SECRET_FIELDS:
            event_dict[name] = _CUT
        elif isinstance(value, str):
            event_dict[name] = without_secrets(value)
    return event_dict


def configure_logs(level: str = "info", form: str = "console", process: Literal["http", "engine"] = "http") -> None:
    """Set up structlog and route the standard library's logs, uvicorn's included, through it.

    Args:
        level: debug, info, warning or error.
        form: ``console`` or ``json``.
        process: which of the two this is; every JSON line says so.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[structlog.typing.Processor] = (
        [_named(process), structlog.processors.JSONRenderer()]
        if form == "json"
        # Not rich's tracebacks: they print local variables, which may be secret, and take seconds.
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                cut_secrets,
                *rendered,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # a line for each batch of traces
    if level != "debug":
        for chatty in ("uvicorn.error", "httpx", "filelock", "transformers"):
            logging.getLogger(chatty).setLevel(logging.WARNING)


def _named(process: str) -> structlog.typing.Processor:
    def name_process(
        logger: structlog.typing.WrappedLogger, method: str, event_dict: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        del logger, method
        event_dict["process"] = process
        return event_dict

    return name_process
