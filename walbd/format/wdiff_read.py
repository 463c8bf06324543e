"""Reading wdiff files: strictly, and in memory that does not depend on what the file claims.

Sorted:   [header 32] { [pack header 4096] [data area] } ... [end pack 4096]
Indexed:  [header 32] [images] [0..7 zeros] [index record 48] ... [index super block 24]

Readers give extents; data is fetched later and only where it is visible (walbd.format.wdiff_batch). A file without
its end pack, or with anything behind its end, is damaged.

Source: docs/formats.md, "wdiff: sorted" and "wdiff: indexed".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.ext.checksum import checksum
from walbd.ext.wdiff import parse_index, parse_pack
from walbd.format.files import ReadFile
from walbd.format.wdiff import (
    HEADER_B,
    INDEX_RECORD_B,
    INDEX_SUPER,
    INDEX_SUPER_B,
    PACK_B,
    REASONS,
    RECORD_B,
    WdiffHeader,
    WdiffType,
    corrupt,
    parse_header,
)

INDEX_BATCH: Final = 4096  # index records read at a time


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack of a sorted wdiff whose header is good."""

    offset_b: int  # of the header in the file
    header: bytes
    data_size_b: int  # of the data area behind it
    extents: bytes


@dataclass(frozen=True, slots=True)
class IndexPart:
    """Some records of an index, all good."""

    offset_b: int  # in the file
    records: bytes
    extents: bytes


class SortedReader:
    """A sorted wdiff."""

    def __init__(self, file: ReadFile, header: WdiffHeader) -> None:
        self.file = file
        self.header = header

    def packs(self, source: int = 0) -> Iterator[Pack]:
        """Yield the packs in order, without the end pack; raises CorruptData at the first damage.

        Data is not read, but is known to lie within the file.
        """
        size_b = self.file.size()
        at, end_lb = HEADER_B, 0
        while True:
            header = self.file.pread(PACK_B, at)
            if len(header) < PACK_B:
                raise corrupt("the file ends without an end pack", self.file.path, at)
            code, record, is_end, data_size_b, end_lb, extents = parse_pack(header, at + PACK_B, source, end_lb)
            if code:
                raise bad_pack(code, record, self.file.path, at)
            if is_end:
                if at + PACK_B != size_b:
                    raise corrupt("something follows the end pack", self.file.path, at + PACK_B)
                return
            if data_size_b > size_b - at - PACK_B:
                raise corrupt("the file ends within the data of a pack", self.file.path, size_b, pack=at)
            yield Pack(at, header, data_size_b, extents)
            at += PACK_B + data_size_b

    def extents(self, source: int = 0) -> Iterator[bytes]:
        """Yield the extents in batches; they refer to the file by the number `source`."""
        for pack in self.packs(source):
            yield pack.extents


class IndexedReader:
    """An indexed wdiff."""

    def __init__(self, file: ReadFile, header: WdiffHeader) -> None:
        """Read the index super block; raises CorruptData."""
        self.file = file
        self.header = header
        size_b = file.size()
        super_at = size_b - INDEX_SUPER_B
        data = file.pread(INDEX_SUPER_B, super_at) if super_at >= HEADER_B else b""
        if len(data) < INDEX_SUPER_B:
            raise corrupt("the file ends before its index", file.path, size_b)
        if checksum(data) != 0:
            raise corrupt("the checksum of the index super block does not match", file.path, super_at)
        self.index_b, self.n_records, self.n_data, _, _ = INDEX_SUPER.unpack(data)
        if self.index_b % 8 or self.index_b < HEADER_B:
            raise corrupt("the index lies at an impossible offset", file.path, super_at, index_offset=self.index_b)
        if self.index_b + self.n_records * INDEX_RECORD_B != super_at:
            raise corrupt(
                "the index does not end where it must",
                file.path,
                super_at,
                index_offset=self.index_b,
                n_records=self.n_records,
            )

    def index(self, source: int = 0) -> Iterator[IndexPart]:
        """Yield the index in parts; raises CorruptData at the first damage. Data is not read."""
        end_lb = 0
        for first in range(0, self.n_records, INDEX_BATCH):
            at = self.index_b + first * INDEX_RECORD_B
            wanted = min(INDEX_BATCH, self.n_records - first) * INDEX_RECORD_B
            records = self.file.pread(wanted, at)
            if len(records) < wanted:
                raise corrupt("the file ends within its index", self.file.path, at + len(records))
            code, record, end_lb, extents = parse_index(records, self.index_b, source, end_lb)
            if code:
                raise corrupt(
                    REASONS[code].format(part="index record"), self.file.path, at + record * INDEX_RECORD_B
                )
            yield IndexPart(at, records, extents)

    def extents(self, source: int = 0) -> Iterator[bytes]:
        """Yield the extents in batches; they refer to the file by the number `source`."""
        for part in self.index(source):
            yield part.extents


WdiffReader = SortedReader | IndexedReader


def open_wdiff(file: ReadFile) -> WdiffReader:
    """Return a reader for an open wdiff of either container; raises CorruptData."""
    header = parse_header(file.pread(HEADER_B, 0), file.path)
    return SortedReader(file, header) if header.type is WdiffType.SORTED else IndexedReader(file, header)


def bad_pack(code: int, record: int, path: object, pack_at: int) -> CorruptData:
    """Make the error for a pack header that `parse_pack` refused."""
    at = pack_at if record < 0 else pack_at + 16 + RECORD_B * record
    facts = {} if record < 0 else {"pack": pack_at}
    return corrupt(REASONS[code].format(part="pack header"), path, at, **facts)
