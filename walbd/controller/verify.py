"""Checks of arguments: a wrong type is a TypeError, a wrong value a UsageError. Nothing was tried then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from walbd.controller.constants import COMPRESS_NAMES
from walbd.errors import UsageError
from walbd.ids import volume_name
from walbd.units import UINT64_MAX, parse_size

_Types = type | Iterable[type]


def verify_type(obj: object, typeValue: _Types, elemType: _Types | None = None) -> None:
    """Raise TypeError unless `obj` is of (one of) the given types, and its elements of (one of) `elemType`.

    A bool does not count as an int.
    """
    _verify_one(obj, typeValue, "")
    if elemType is not None:
        elements: Any = obj
        for element in elements:
            _verify_one(element, elemType, "an element ")


def _verify_one(obj: object, wanted: _Types, what: str) -> None:
    types = (wanted,) if isinstance(wanted, type) else tuple(wanted)
    fits = isinstance(obj, types) and not (isinstance(obj, bool) and bool not in types and object not in types)
    if not fits:
        names = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{what}must be {names}, not {type(obj).__name__}: {obj!r}")


def verify_int(obj: object) -> None:
    """Raise TypeError unless `obj` is an int."""
    verify_type(obj, int)


def verify_u64(obj: object) -> None:
    """Raise TypeError unless `obj` is an int, UsageError unless it fits in 64 bits without sign."""
    verify_type(obj, int)
    assert isinstance(obj, int)
    if not 0 <= obj <= UINT64_MAX:
        raise UsageError("the number is not from 0 to 2^64-1", value=obj)


def verify_function(obj: object) -> None:
    """Raise TypeError unless `obj` can be called."""
    if not isinstance(obj, Callable):  # type: ignore[arg-type]
        raise TypeError(f"must be callable: {obj!r}")


def verify_gid_range(gidB: int, gidE: int, msg: str) -> None:
    """Raise UsageError with `msg` unless both are generations and `gidB <= gidE`."""
    verify_u64(gidB)
    verify_u64(gidE)
    if gidB > gidE:
        raise UsageError(f"{msg}: the first generation is above the second", gidB=gidB, gidE=gidE)


def verify_size_unit(sizeU: str) -> None:
    """Raise UsageError unless `sizeU` is a number of bytes with an optional k, m, g, t or p, and nothing more."""
    verify_type(sizeU, str)
    parse_size(sizeU)


def verify_compress_kind(kind: int) -> None:
    """Raise UsageError unless `kind` is one of the CMPR_ numbers."""
    verify_type(kind, int)
    if kind not in COMPRESS_NAMES:
        raise UsageError("unknown kind of compression", hint="use one of the CMPR_ constants", kind=kind)


def verify_shutdown_mode(mode: str, msg: str) -> None:
    """Raise UsageError with `msg` unless `mode` is graceful or force."""
    _verify_word(mode, ("graceful", "force"), msg)


def verify_stop_mode(mode: str, *, empty: bool) -> None:
    """Raise UsageError unless `mode` is graceful, force or (`empty`: at a proxy) empty."""
    _verify_word(mode, ("graceful", "force", "empty") if empty else ("graceful", "force"), "bad stop mode")


def verify_volume(vol: str) -> None:
    """Raise TypeError or UsageError unless `vol` is the name of a volume."""
    verify_type(vol, str)
    volume_name(vol)


def verify_timeout(timeoutS: float) -> None:
    """Raise TypeError or UsageError unless `timeoutS` is a number of seconds."""
    verify_type(timeoutS, (int, float))
    if not timeoutS >= 0:
        raise UsageError("a time limit cannot be negative", timeout_s=timeoutS)


def _verify_word(word: str, words: tuple[str, ...], msg: str) -> None:
    verify_type(word, str)
    if word not in words:
        raise UsageError(msg, hint="use " + " or ".join(words), word=word)
