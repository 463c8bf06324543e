"""Times as labels and file names write them: unix seconds from the year 1900 to 9999, UTC."""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from walbd.format.meta.errors import BadLabel

TIME_MIN_S: Final = -2_208_988_800  # 1900-01-01T00:00:00
TIME_MAX_S: Final = 253_402_300_799  # 9999-12-31T23:59:59
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_COMPACT: Final = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})")


def check_time(timestamp: int) -> None:
    """Raise BadLabel unless `timestamp` can be written in a file name."""
    if not TIME_MIN_S <= timestamp <= TIME_MAX_S:
        raise BadLabel("the time is outside of the years 1900 to 9999", timestamp=timestamp)


def format_compact(timestamp: int) -> str:
    """Write unix seconds as `YYYYMMDDhhmmss`."""
    check_time(timestamp)
    return (_EPOCH + dt.timedelta(seconds=timestamp)).strftime("%Y%m%d%H%M%S")


def parse_compact(text: str) -> int:
    """Read what `format_compact` writes; raises BadLabel."""
    match = _COMPACT.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute, second = map(int, match.groups())
        when = dt.datetime(year, month, day, hour, minute, second, tzinfo=dt.UTC)
    except ValueError as exc:
        raise BadLabel("not a time", hint="write YYYYMMDDhhmmss in UTC", text=text) from exc
    timestamp = (when - _EPOCH) // dt.timedelta(seconds=1)
    check_time(timestamp)
    return timestamp
