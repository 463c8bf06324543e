"""wdiff files: what changed on a volume between two snapshots. The parts that both containers share.

    off size  file header, 32 bytes
      0    4  checksum of these 32 bytes, salt 0
      4    2  version 2
      6    1  type: 0 sorted, 1 indexed
      7    9  0
     16   16  uuid of the log that the changes come from

A sorted file goes on with packs (walbd.format.wdiff_read.SortedReader), an indexed one with stored images and an
index (IndexedReader). Bytes are checked and laid out by walbd.ext.wdiff.

Source: docs/formats.md, "wdiff".
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.ext.buffers import Buf
from walbd.ext.checksum import checksum

VERSION: Final = 2
HEADER_B: Final = 32
PACK_B: Final = 4096
PACK_RECORDS_MAX: Final = 127
RECORD_B: Final = 32
INDEX_RECORD_B: Final = 48
INDEX_SUPER_B: Final = 24
INDEX_LIMIT_LB: Final = 2048  # default largest index record

RECORD: Final = struct.Struct(
    "<QIBBHIIII"
)  # of a pack: address, blocks, flags, kind, -, offset, size, checksum, -
INDEX_RECORD: Final = struct.Struct("<QIBBHQIIIIII")
INDEX_SUPER: Final = struct.Struct("<QIIII")
_HEADER: Final = struct.Struct("<IHBBII16s")

END_PACK: Final = b"\x00\x00\xff\xff\x00\x00\x01" + bytes(PACK_B - 7)

HINT: Final = "the file is damaged: use another copy of it, from a replica or from where it was made"

REASONS: Final = (  # by WDIFF_ code of ext/src/wdiff.h
    "",
    "the checksum of a {part} does not match",
    "a {part} claims more than 127 records",
    "a {part} has no records and is no end",
    "the end pack is not empty",
    "a record has impossible flags",
    "a record has no blocks",
    "a record is larger than any IO",
    "a record has an address that no volume has",
    "a record overlaps its predecessor, or does not come after it",
    "a record has an unknown compression",
    "a record has an impossible data size",
    "the data of a record is not where it must be",
    "the data sizes of the records do not add up to the size of the pack",
    "an index record is not an aligned power of two",
    "an index record lies outside its image",
)


class WdiffType(enum.IntEnum):
    """The container; the values are on disk."""

    SORTED = 0
    INDEXED = 1

    @property
    def text(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class WdiffHeader:
    """The header of a wdiff file."""

    type: WdiffType
    uuid: bytes  # 16 bytes; all zero in files merged by the old tools

    def pack(self) -> bytes:
        """Return the 32 bytes of the header."""
        data = _HEADER.pack(0, VERSION, self.type, 0, 0, 0, self.uuid)
        return checksum(data).to_bytes(4, "little") + data[4:]

    @property
    def checksum(self) -> int:
        """Return the checksum that the header carries."""
        return int.from_bytes(self.pack()[:4], "little")


def corrupt(message: str, path: object, offset: int, **facts: object) -> CorruptData:
    """Make the error for damaged bytes at `offset` of a wdiff."""
    return CorruptData(message, hint=HINT, path=str(path), offset=offset, **facts)


def parse_header(data: Buf, path: object) -> WdiffHeader:
    """Check the first 32 bytes of a wdiff; raises CorruptData."""
    if len(data) < HEADER_B:
        raise corrupt("the file ends within its header", path, len(data))
    _, version, type_, _, _, _, uuid = _HEADER.unpack_from(data)
    if checksum(memoryview(data)[:HEADER_B]) != 0:
        raise corrupt("the checksum of the wdiff header does not match", path, 0)
    if version != VERSION:
        raise CorruptData(
            "not a wdiff of version 2",
            hint="this version can neither be read nor converted; make the wdiff again",
            path=str(path),
            offset=4,
            version=version,
        )
    if type_ not in (WdiffType.SORTED, WdiffType.INDEXED):
        raise corrupt("unknown type of wdiff", path, 6, type=type_)
    return WdiffHeader(WdiffType(type_), uuid)


def flags_text(flags: int) -> str:
    """Write record flags as two letters: Z all-zero, D discard, - neither."""
    return ("Z" if flags & 2 else "-") + ("D" if flags & 4 else "-")
