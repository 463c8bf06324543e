"""wlog files: a stretch of log, copied pack by pack.

    [file header: 4096 bytes] [logpack] [logpack] ... [end block: one PB]

File header: 56 bytes of fields, little-endian, zeros up to 4096 (also for 512-byte PBs):

    off size field                     off size field
      0   2  sector type: 4             20   4  PB size
      2   2  version: 2                 24  16  uuid of the log device
      4   2  header size: 4096          40   8  begin lsid: that of the first pack
      6   2  reserved                   48   8  end lsid: an upper bound, 2^64-1 = not known
      8   4  checksum, salt 0
     12   4  salt of the logpacks
     16   4  LB size: 512

The lsid of a byte is begin + (offset - 4096) / pbs. Several wlogs may follow one another in one stream, each
continuing the lsids and the uuid of the one before; salt and PB size may change.

The reader is strict. What it hands out is verified, and a file that stops anywhere but after an end block is
damaged: a pack header that does not verify is not an end.

Source: docs/formats.md, "wlog file".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from walbd.errors import CorruptData
from walbd.ext.buffers import Buf
from walbd.ext.checksum import checksum
from walbd.ext.logpack import Stop
from walbd.format.files import ReadFile
from walbd.format.logpack import FAULT_TEXT, end_header
from walbd.format.logscan import CHUNK_B, Batch, LogScanner
from walbd.format.superblock import PBS_VALUES
from walbd.ids import INVALID_LSID, Lsid
from walbd.units import LB

HEADER_SIZE_B: Final = 4096
SECTOR_TYPE_WLOG: Final = 4
WLOG_VERSION: Final = 2

_FIELDS: Final = struct.Struct("<HHHHIIII16sQQ")
_CHECKSUM_AT: Final = 8
_HINT_COPY: Final = "take another copy of this wlog, or extract it again from the log device"


class WriteAt(Protocol):
    """The part of `walbd.fs.File` that a writer needs."""

    def pwrite(self, data: Buf, offset_b: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WlogHeader:
    """The file header of a wlog."""

    pbs: int  # PB size [byte]
    salt: int  # of the logpack checksums
    uuid: bytes  # of the log device
    begin_lsid: Lsid
    end_lsid: Lsid = INVALID_LSID  # exclusive upper bound; INVALID_LSID: not known

    def __post_init__(self) -> None:
        if self.pbs not in PBS_VALUES:
            raise ValueError(f"impossible PB size {self.pbs}")
        if len(self.uuid) != 16:
            raise ValueError("a uuid has 16 bytes")
        if not self.begin_lsid < self.end_lsid:
            raise ValueError(f"empty lsid range [{self.begin_lsid}, {self.end_lsid})")

    def pack(self) -> bytes:
        """Return the header as it stands in a file: 4096 bytes."""
        block = bytearray(HEADER_SIZE_B)
        _FIELDS.pack_into(
            block,
            0,
            SECTOR_TYPE_WLOG,
            WLOG_VERSION,
            HEADER_SIZE_B,
            0,
            0,
            self.salt,
            LB,
            self.pbs,
            self.uuid,
            self.begin_lsid,
            self.end_lsid,
        )
        struct.pack_into("<I", block, _CHECKSUM_AT, checksum(block))
        return bytes(block)

    @staticmethod
    def parse(block: Buf, *, source: str, offset: int = 0) -> WlogHeader:
        """Read a file header; raises CorruptData (`path`, `offset`) unless everything in it is valid."""

        def bad(message: str, **facts: object) -> CorruptData:
            return CorruptData(message, hint=_HINT_COPY, path=source, offset=offset, **facts)

        if len(block) < HEADER_SIZE_B:
            raise bad("the file is too short for a wlog header", size=len(block))
        view = memoryview(block)[:HEADER_SIZE_B]
        (
            sector_type,
            version,
            header_size,
            _,
            _,
            salt,
            lbs,
            pbs,
            uuid,
            begin_lsid,
            end_lsid,
        ) = _FIELDS.unpack_from(view)
        if sector_type != SECTOR_TYPE_WLOG:
            raise bad("not a wlog: wrong sector type", sector_type=sector_type)
        if checksum(view) != 0:
            raise bad("the checksum of the wlog header does not match")
        if version != WLOG_VERSION:
            raise bad("the wlog version is not supported", version=version, supported=WLOG_VERSION)
        if header_size != HEADER_SIZE_B or lbs != LB or pbs not in PBS_VALUES:
            raise bad("the wlog header holds an impossible size", header_size=header_size, lbs=lbs, pbs=pbs)
        if begin_lsid >= end_lsid:
            raise bad("the lsid range of the wlog is empty", begin_lsid=begin_lsid, end_lsid=end_lsid)
        return WlogHeader(pbs=pbs, salt=salt, uuid=uuid, begin_lsid=Lsid(begin_lsid), end_lsid=Lsid(end_lsid))


class WlogReader:
    """A wlog (or several, one after the other) in a file. The header is read and checked at construction.

    `header` is that of the part being read, `offset_b` where that part begins in the file, `lsid` where what was
    handed out ends: after the last batch, the real end of the wlog.
    """

    def __init__(self, file: ReadFile) -> None:
        self._file = file
        self._size_b = file.size()
        self.path = str(file.path)
        self.offset_b = 0
        self.header = self._read_header(0)
        self.lsid = self.header.begin_lsid

    def _read_header(self, offset_b: int) -> WlogHeader:
        return WlogHeader.parse(self._file.pread(HEADER_SIZE_B, offset_b), source=self.path, offset=offset_b)

    def offset_of(self, lsid: int) -> int:
        """Return the byte offset in the file of an lsid of the current part."""
        return self.offset_b + HEADER_SIZE_B + (lsid - self.header.begin_lsid) * self.header.pbs

    def batches(
        self, *, verify_data: bool = True, collect: bool = True, chunk_b: int = CHUNK_B
    ) -> Iterator[Batch]:
        """Yield everything that is whole and good, in order; then return at the proper end, or raise.

        Raises CorruptData (`path`, `offset`, `lsid`) at the first thing that is wrong, after the packs before it
        have been handed out: damaged or contradictory headers, bad data, a gap in the lsids, a file that ends
        without an end block, anything else behind the end block than another wlog that continues this one.
        """
        while True:
            scanner = self._scanner(verify_data, collect, chunk_b)
            for batch in scanner:
                if batch.lsid_end > self.header.end_lsid:
                    raise CorruptData(
                        "the wlog goes on beyond the end lsid in its header",
                        hint=_HINT_COPY,
                        path=self.path,
                        offset=self.offset_of(batch.lsid),
                        lsid=batch.lsid,
                        end_lsid=self.header.end_lsid,
                    )
                yield batch
                self.lsid = batch.lsid_end
            self._check_end(scanner)
            end_b = self.offset_of(self.lsid) + self.header.pbs
            if end_b == self._size_b:
                return
            self._next_part(end_b)

    def _scanner(self, verify_data: bool, collect: bool, chunk_b: int) -> LogScanner:
        begin_b, header = self.offset_b + HEADER_SIZE_B, self.header

        def read(view: memoryview, lsid: int) -> int:
            return self._file.pread_into(view, begin_b + (lsid - header.begin_lsid) * header.pbs)

        return LogScanner(
            read,
            pbs=header.pbs,
            salt=header.salt,
            lsid=header.begin_lsid,
            verify_data=verify_data,
            collect=collect,
            chunk_b=chunk_b,
        )

    def _check_end(self, scanner: LogScanner) -> None:
        if scanner.stop is Stop.END:
            return
        offset = self.offset_b + HEADER_SIZE_B + scanner.trouble_b
        facts: dict[str, object] = {"record": scanner.record} if scanner.record >= 0 else {}
        message = FAULT_TEXT[scanner.fault]
        if scanner.stop is Stop.MORE:
            cut = self._size_b != self.offset_of(scanner.lsid)
            message = "the wlog is cut off inside a logpack" if cut else "the wlog ends without an end block"
            facts = {"size": self._size_b}
        raise CorruptData(message, hint=_HINT_COPY, path=self.path, offset=offset, lsid=scanner.lsid, **facts)

    def _next_part(self, offset_b: int) -> None:
        try:
            header = self._read_header(offset_b)
        except CorruptData as exc:
            raise CorruptData(
                "what follows the end block is not another wlog",
                hint=_HINT_COPY,
                path=self.path,
                offset=offset_b,
                lsid=self.lsid,
            ) from exc
        if header.begin_lsid != self.lsid or header.uuid != self.header.uuid:
            raise CorruptData(
                "another wlog follows that does not continue this one",
                hint="give each wlog as a file of its own",
                path=self.path,
                offset=offset_b,
                lsid=self.lsid,
                begin_lsid=header.begin_lsid,
                uuid=header.uuid.hex(),
            )
        self.offset_b, self.header = offset_b, header


class WlogWriter:
    """Writes a wlog: the header at construction, packs as they are, the end block. Syncs nothing."""

    def __init__(self, file: WriteAt, header: WlogHeader) -> None:
        self.header = header
        self.lsid = header.begin_lsid
        self._file = file
        file.pwrite(header.pack(), 0)

    def _offset_of(self, lsid: int) -> int:
        return HEADER_SIZE_B + (lsid - self.header.begin_lsid) * self.header.pbs

    def append(self, data: Buf) -> None:
        """Add whole PBs of log that continue what was written so far; the caller has verified them."""
        size_pb, rest = divmod(len(data), self.header.pbs)
        assert rest == 0
        self._file.pwrite(data, self._offset_of(self.lsid))
        self.lsid = Lsid(self.lsid + size_pb)

    def cut(self, lsid: int, header: bytes, lsid_end: int) -> None:
        """Replace the header of the pack at `lsid`, and let the log end at `lsid_end`."""
        if header:
            self._file.pwrite(header, self._offset_of(lsid))
        self.lsid = Lsid(lsid_end)

    def finish(self) -> int:
        """Write the end block; return the size of the file [byte]. A longer file has to be cut to it."""
        block = end_header(self.header.pbs, self.header.salt)
        self._file.pwrite(block, self._offset_of(self.lsid))
        return self._offset_of(self.lsid) + len(block)
