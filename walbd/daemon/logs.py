"""Logs are events: a constant name in the past tense, and facts as fields (structlog)."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal

import structlog

from walbd.errors import WalbError, code_of

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


_NUMBERS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
}


class _Level:
    """The least level that is written, for all loggers that exist and will exist."""

    def __init__(self) -> None:
        self.number = logging.INFO

    def __call__(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if _NUMBERS.get(method, logging.CRITICAL) < self.number:
            raise structlog.DropEvent
        return event


_level: Final = _Level()


def set_level(level: LogLevel) -> None:
    """Change the least level of the lines that this process writes."""
    _level.number = getattr(logging, level.upper())


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
    set_level(level)
    processors: list[Any] = [
        _level,  # first: what is not written costs little
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
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
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
