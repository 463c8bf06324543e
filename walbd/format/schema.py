"""Checking of plain values against types: the one door to `msgspec.convert`.

msgspec finds out about a type when it is first used, and is not made for two threads that do so at once: the
process dies of it, as it may when several volumes are loaded at start. So the first uses of types go one after the
other; later ones need no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

_first_use: Final = threading.RLock()
_used: Final[set[type]] = set()


def convert(value: Any, cls: type[T], *, builtin_types: Iterable[type] = ()) -> T:
    """Return `value` as a `cls`; names, types and bounds are checked. Raises msgspec.ValidationError.

    `builtin_types`: types beyond those of JSON that stand for themselves. May be called from any thread.
    """
    if cls in _used:
        return msgspec.convert(value, cls, strict=True, builtin_types=builtin_types)
    with _first_use:
        try:
            return msgspec.convert(value, cls, strict=True, builtin_types=builtin_types)
        finally:
            _used.add(cls)
