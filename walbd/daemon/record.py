"""The one durable record of a volume: `volume.json`, replaced atomically.

    {"format": 1, "record": {...}, "checksum": "<xxh3-64 of the record's canonical JSON>"}

For people to read and, in an emergency, to edit: a record without `checksum` is taken as it is. Fields are
integers, strings and booleans, never floats; uuids are hexadecimal text. Source: docs/formats.md, "volume.json".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import xxhash

from walbd.errors import CorruptData
from walbd.format.schema import convert
from walbd.fs import FileSystem

RECORD_NAME: Final = "volume.json"
FORMAT: Final = 1

T = TypeVar("T")


def save_record(fs: FileSystem, path: Path, record: Any) -> None:
    """Replace the file durably. Blocks; raises DiskFailed, and then the old record is still there."""
    plain = msgspec.to_builtins(record)
    assert not _has_float(plain), "records hold no floats"
    whole = {"format": FORMAT, "record": plain, "checksum": _checksum(plain)}
    fs.replace_durably(path, (json.dumps(whole, indent=2) + "\n").encode())


def load_record(fs: FileSystem, path: Path, cls: type[T]) -> T:
    """Read a record. Raises NotFound, or CorruptData when it is not what `save_record` writes."""
    data = fs.read_bytes(path, size_max_b=64 << 20)
    try:
        whole = json.loads(data)
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise ValueError("unknown format")
        plain = whole["record"]
        if "checksum" in whole and whole["checksum"] != _checksum(plain):
            raise ValueError("the checksum differs")
        return convert(plain, cls)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CorruptData(
            "the record of the volume is damaged",
            hint="restore the file from a backup, or clear the volume and initialise it again",
            path=str(path),
            offset=0,
            reason=str(exc)[:200],
        ) from exc


def _has_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_float(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_float(item) for item in value)
    return isinstance(value, float)


def _checksum(plain: Any) -> str:
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
