"""Logpacks: one header PB and the data of its records.

    logpack at lsid L:   [header PB: lsid L] [data PBs: lsids L+1 .. L+total_io_size]
    the next one:        L + 1 + total_io_size

The header is 24 bytes, then 32 bytes for each record, then zeros up to a whole PB; the layout of both is at the
head of ext/logpack.pyx. This module is for one pack at a time (making, showing); whole buffers are scanned by
`walbd.ext.logpack`, which hands records on as packed structs of `RECORD_B` bytes.

Source: docs/formats.md, "Logpack".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.ext.buffers import Buf
from walbd.ext.checksum import checksum
from walbd.ext.logpack import Fault, check_header
from walbd.ids import INVALID_LSID, Lsid
from walbd.units import LB, ceil_pb

SECTOR_TYPE_LOGPACK: Final = 3
HEADER_SIZE_B: Final = 24
RECORD_SIZE_B: Final = 32  # of a record in a header
TOTAL_IO_SIZE_MAX_PB: Final = 65535

FLAG_EXIST: Final = 1  # set in every record
FLAG_PADDING: Final = 2
FLAG_DISCARD: Final = 4

LOG_RECORD: Final = struct.Struct("<QQQIIII")  # walb_log_record: what scans hand on, see ext/src/walb.h
LOG_RECORD_B: Final = LOG_RECORD.size

_HEADER: Final = struct.Struct("<IHHQHHI")
_RECORD: Final = struct.Struct("<IIQIHHQ")

FAULT_TEXT: Final = {
    Fault.NONE: "nothing is wrong",
    Fault.TYPE: "not a logpack header: wrong sector type",
    Fault.CHECKSUM: "the checksum of the logpack header does not match",
    Fault.EMPTY: "a logpack header without records that is no end header",
    Fault.LSID: "the logpack header has another lsid than its place",
    Fault.N_RECORDS: "the logpack header claims more records than fit",
    Fault.N_PADDING: "the logpack header counts its paddings wrongly",
    Fault.LSID_OVERFLOW: "the lsid of the logpack header is out of range",
    Fault.RECORD_FLAGS: "a log record has impossible flags",
    Fault.RECORD_SIZE: "a log record has an impossible size",
    Fault.RECORD_OFFSET: "a log record has an impossible offset",
    Fault.RECORD_LSID: "the lsid of a log record does not follow from its place in the pack",
    Fault.TOTAL_SIZE: "the data of the log records does not add up to the size of the pack",
    Fault.DATA_CHECKSUM: "the data of a log record does not match its checksum",
}


def records_max(pbs: int) -> int:
    """Return how many records fit a header: 15 for 512-byte PBs, 127 for 4096."""
    return (pbs - HEADER_SIZE_B) // RECORD_SIZE_B


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """One record of a logpack."""

    lsid_local: int  # place in the pack: lsid - logpack lsid, at least 1
    offset_lb: int  # on the walb device; 0 for padding
    io_size_lb: int
    flags: int = FLAG_EXIST
    checksum: int = 0  # of io_size * 512 bytes of data, salted; 0 for discard and padding

    @property
    def is_padding(self) -> bool:
        return bool(self.flags & FLAG_PADDING)

    @property
    def is_discard(self) -> bool:
        return bool(self.flags & FLAG_DISCARD)

    @property
    def has_data(self) -> bool:
        """A normal record: neither padding nor discard."""
        return not self.flags & (FLAG_PADDING | FLAG_DISCARD)

    def owned_pb(self, pbs: int) -> int:
        """Return how many PBs of the pack belong to this record: none for a discard."""
        return 0 if self.is_discard else ceil_pb(self.io_size_lb, pbs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackHeader:
    """The header of one logpack; one without records is the end header."""

    lsid: Lsid
    total_io_size_pb: int  # PBs after the header: discards own none, paddings count
    records: tuple[LogRecord, ...]
    checksum: int = 0  # of the whole PB as read; `pack_header` computes its own

    @property
    def is_end(self) -> bool:
        return not self.records

    @property
    def n_padding(self) -> int:
        return sum(record.is_padding for record in self.records)

    @property
    def next_lsid(self) -> Lsid:
        """The lsid of the pack that follows."""
        return Lsid(self.lsid + 1 + self.total_io_size_pb)


END_HEADER: Final = PackHeader(lsid=INVALID_LSID, total_io_size_pb=0, records=())


def make_header(lsid: int, pbs: int, items: Sequence[tuple[int, int, int, int]]) -> PackHeader:
    """Return the header of a pack at `lsid` with records of (offset_lb, io_size_lb, flags, checksum).

    Places in the pack and sizes are computed; raises ValueError when the records do not fit one pack.
    """
    local, records = 1, []
    for offset_lb, io_size_lb, flags, csum in items:
        record = LogRecord(
            lsid_local=local, offset_lb=offset_lb, io_size_lb=io_size_lb, flags=flags, checksum=csum
        )
        records.append(record)
        local += record.owned_pb(pbs)
    if local - 1 > TOTAL_IO_SIZE_MAX_PB or not 0 < len(records) <= records_max(pbs):
        raise ValueError("the records do not fit one logpack")
    return PackHeader(lsid=Lsid(lsid), total_io_size_pb=local - 1, records=tuple(records))


def pack_header(header: PackHeader, *, pbs: int, salt: int) -> bytes:
    """Return the header as it stands on disk: one PB, checksum filled in. Raises ValueError unless it is valid."""
    block = bytearray(pbs)
    n = len(header.records)
    if n > records_max(pbs):
        raise ValueError("the records do not fit one logpack")
    _HEADER.pack_into(
        block, 0, 0, SECTOR_TYPE_LOGPACK, header.total_io_size_pb, header.lsid, n, header.n_padding, 0
    )
    for i, r in enumerate(header.records):
        at = HEADER_SIZE_B + RECORD_SIZE_B * i
        lsid = header.lsid + r.lsid_local
        _RECORD.pack_into(block, at, r.checksum, r.flags, r.offset_lb, r.io_size_lb, r.lsid_local, 0, lsid)
    struct.pack_into("<I", block, 0, checksum(block, salt))
    fault, _ = check_header(block, pbs, salt)
    if fault is not Fault.NONE:
        raise ValueError(FAULT_TEXT[fault])
    return bytes(block)


def end_header(pbs: int, salt: int) -> bytes:
    """Return the block that ends a wlog file, and a log whose only pack after the end was torn away."""
    return pack_header(END_HEADER, pbs=pbs, salt=salt)


def parse_header(block: Buf, *, pbs: int, salt: int, source: str, offset: int) -> PackHeader:
    """Read the header in the first PB of `block`; a proper end header is one with no records.

    Raises CorruptData (`path`, `offset`, and `record` when one record is at fault) unless everything that
    can be told from the header alone is right.
    """
    if len(block) < pbs:
        raise CorruptData("the logpack header is cut off", path=source, offset=offset, size=len(block), pbs=pbs)
    view = memoryview(block)[:pbs]
    fault, at_fault = check_header(view, pbs, salt)
    if fault is not Fault.NONE:
        raise corrupt_pack(fault, source=source, offset=offset, record=at_fault)
    csum, _, total, lsid, n, _, _ = _HEADER.unpack_from(view)
    records = []
    for fields in _RECORD.iter_unpack(view[HEADER_SIZE_B : HEADER_SIZE_B + RECORD_SIZE_B * n]):
        record_csum, flags, offset_lb, io_size_lb, local, _, _ = fields
        records.append(
            LogRecord(
                lsid_local=local, offset_lb=offset_lb, io_size_lb=io_size_lb, flags=flags, checksum=record_csum
            )
        )
    return PackHeader(lsid=Lsid(lsid), total_io_size_pb=total, records=tuple(records), checksum=csum)


def corrupt_pack(
    fault: Fault, *, source: str, offset: int, record: int = -1, hint: str = "", **facts: object
) -> CorruptData:
    """Return the error for a fault found by a scan; `record` is named when it is not -1."""
    if record >= 0:
        facts["record"] = record
    return CorruptData(FAULT_TEXT[fault], hint=hint, path=source, offset=offset, **facts)


def tail_b(io_size_lb: int, pbs: int) -> int:
    """Return how many bytes of a record's last PB are not data: undefined, covered by no checksum."""
    return ceil_pb(io_size_lb, pbs) * pbs - io_size_lb * LB
