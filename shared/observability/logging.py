"""Structured logs on standard error: one event a line, never with a prompt, an answer or a key in it.

Code logs with `structlog.get_logger().info("short_event_name", field=value)`. A console format is
used on a terminal, JSON elsewhere. Tracebacks are printed without local variables, because locals
hold prompts.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

FORBIDDEN_FIELDS = frozenset(
    {"prompt", "messages", "content", "text", "completion", "api_key", "authorization", "secret", "password"}
)

LogFormat = Literal["auto", "console", "json"]


def configure_logging(level: str = "info", log_format: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's loggers of this process; may be called again."""
    out = stream if stream is not None else sys.stderr
    console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        withhold_content,
    ]
    structlog.configure(
        processors=[*shared, *_renderers(console, out)],
        wrapper_class=structlog.make_filtering_bound_logger(_level_number(level)),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(console, out)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(_level_number(level), logging.WARNING))


def withhold_content(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace fields that could carry a user's text or a secret; the name of the field stays visible."""
    for name in FORBIDDEN_FIELDS & event.keys():
        event[name] = "[withheld]"
    return event


def _renderers(console: bool, out: TextIO) -> list[Processor]:
    if console:
        colors = out.isatty() and "NO_COLOR" not in os.environ
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _level_number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
