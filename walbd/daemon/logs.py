"""Logs are events: a constant name in the past tense, and facts as fields (structlog)."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

from walbd.errors import WalbError, code_of

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class StderrLogger:
    """Writes lines to standard error. A line that cannot be written is lost: logging never fails its caller."""

    def msg(self, message: str) -> None:
        """Write one line."""
        try:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # whoever read it has gone (or closed it); the work that is logged goes on

    debug = info = warning = error = critical = exception = fatal = failure = log = msg


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Set up logging for a process: to standard error, for people or as JSON lines."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: StderrLogger(),
        cache_logger_on_first_use=False,
    )


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return an error as log fields: code, error, hint and facts."""
    fields: dict[str, Any] = {"code": code_of(error)}
    if isinstance(error, WalbError):
        fields["error"] = error.message
        if error.hint:
            fields["hint"] = error.hint
        if error.facts:
            fields["facts"] = dict(error.facts)  # nested: a fact may have any name
    else:
        fields["error"] = f"{type(error).__name__}: {error}"
    return fields
