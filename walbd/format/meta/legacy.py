"""Import of a `base` file as older archives wrote it (docs/metadata.md, Old base files).

    u16   tag 0x0313 (little endian)
    u8    1 while an apply is in progress, else 0
    int   timestamp [unix second]
    ...   snapshot B
    ...   snapshot E: present even if unused

A snapshot is u16 tag 0x0311, int gid_b, int gid_e. An int is one byte that is the value itself as signed 8
bit, unless it is 0x80 to 0x87: 0x80, 81, 82, 83 announce 1, 2, 4, 8 little-endian bytes, 0x84 to 0x87 the
same with the sign extended.
"""

from __future__ import annotations

from typing import Final

from walbd.errors import CorruptData
from walbd.format.meta.errors import BadLabel
from walbd.format.meta.snapshot import Snapshot
from walbd.format.meta.state import BaseState
from walbd.ids import Gid
from walbd.units import UINT64_MAX

_TAG_STATE: Final = 0x0313
_TAG_SNAPSHOT: Final = 0x0311


def parse_base_file(data: bytes, *, source: str) -> BaseState:
    """Read an old `base` file; `source` names it in errors. Raises CorruptData with source and offset [byte]."""
    reader = _Reader(data, source)
    reader.tag(_TAG_STATE, "a base state")
    applying = reader.take(1, "the flag of an apply in progress")[0]
    if applying > 1:
        raise reader.corrupt("the flag of an apply in progress is neither 0 nor 1", reader.offset - 1)
    timestamp = reader.integer("the time")
    begin = reader.snapshot("B")
    end = reader.snapshot("E")
    if reader.offset != len(data):
        raise reader.corrupt("bytes follow the base state", reader.offset)
    try:
        return BaseState(Snapshot(*begin), Snapshot(*end) if applying else None, timestamp)
    except BadLabel as exc:
        raise reader.corrupt(f"not a base state: {exc.message}", 0) from exc


class _Reader:
    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self._source = source
        self.offset = 0

    def corrupt(self, message: str, offset: int) -> CorruptData:
        return CorruptData(message, source=self._source, offset=offset)

    def take(self, size: int, what: str) -> bytes:
        part = self._data[self.offset : self.offset + size]
        if len(part) < size:
            raise self.corrupt(f"the file ends before {what}", self.offset)
        self.offset += size
        return part

    def tag(self, expected: int, what: str) -> None:
        at = self.offset
        if int.from_bytes(self.take(2, f"the tag of {what}"), "little") != expected:
            raise self.corrupt(f"the tag of {what} is wrong", at)

    def integer(self, what: str) -> int:
        first = self.take(1, what)[0]
        if not 0x80 <= first <= 0x87:
            return first - 256 if first > 0x87 else first
        size = 1 << (first & 3)
        return int.from_bytes(self.take(size, what), "little", signed=first >= 0x84)

    def snapshot(self, what: str) -> tuple[Gid, Gid]:
        self.tag(_TAG_SNAPSHOT, f"snapshot {what}")
        gid_b = Gid(self.integer(f"the begin of snapshot {what}") & UINT64_MAX)
        gid_e = Gid(self.integer(f"the end of snapshot {what}") & UINT64_MAX)
        return gid_b, gid_e
