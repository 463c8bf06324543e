"""Sizes, times and how people write them.

Suffixes in names: `_b` byte, `_lb` logical block (512 bytes), `_pb` physical block of a log (512 or 4096
bytes), `_s` second. Ranges are half-open.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from walbd.errors import UsageError

LB: Final = 512  # bytes in a logical block, always
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
UINT32_MAX: Final = (1 << 32) - 1
UINT64_MAX: Final = (1 << 64) - 1

_SIZE = re.compile(r"([0-9]+)([kmgtpe]?)(?:i?b)?", re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_size(text: str) -> int:
    """Read a size in bytes: a decimal number with an optional binary suffix k m g t p e (either case).

    `64K`, `64KiB` and `65536` are the same. Raises UsageError on anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError("not a size", hint="write bytes, or a number with k, m, g, t, p or e", text=text)
    return int(match[1]) << _SHIFT[match[2].lower()]


def format_size(size_b: int) -> str:
    """Write a size for people: `1.5 GiB`, `512 B`."""
    size = float(size_b)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1024 or unit == "PiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Write a length of time for people: `7 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_lb(size_b: int) -> int:
    """Convert bytes to logical blocks; raises UsageError when they are not a whole number of blocks."""
    if size_b % LB:
        raise UsageError("size is not a multiple of 512 bytes", size_b=size_b)
    return size_b // LB


def ceil_pb(n_lb: int, pbs: int) -> int:
    """Return how many physical blocks of `pbs` bytes hold `n_lb` logical blocks."""
    return (n_lb * LB + pbs - 1) // pbs


def format_time(timestamp: int) -> str:
    """Write unix seconds as `YYYY-MM-DDThh:mm:ss` (UTC), or `---` for zero: not known."""
    if timestamp == 0:
        return "---"
    return dt.datetime.fromtimestamp(timestamp, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parse_time(text: str) -> int:
    """Read what `format_time` writes; raises UsageError on anything else."""
    if text == "---":
        return 0
    try:
        when = dt.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=dt.UTC)
    except ValueError as exc:
        raise UsageError("not a time", hint="write YYYY-MM-DDThh:mm:ss in UTC", text=text) from exc
    return int(when.timestamp())
